"""The driver on the Triton kernels, in the interpreter, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig, generate, ops

CAPTION = """
import json, sys
import torch
from lvspec import AcceptancePolicy, DecodeConfig, generate, ops
from lvspec.models.model import Model
from torch.utils._python_dispatch import TorchDispatchMode

class Seen(TorchDispatchMode):
    counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))

torch.set_num_threads(1)
target, draft, prompt = torch.load(sys.argv[1], weights_only=False)
seen = Seen()
layers = sum(len(Model(model, "model").made.plan.layers) for model in (target, draft))
seen.__enter__()
result = generate(
    target,
    draft,
    prompt,
    policy=AcceptancePolicy.relaxed(),
    config=DecodeConfig(gamma=3, max_new_tokens=6),
)
seen.__exit__(None, None, None)
found = result.tokens.tolist(), result.kinds.tolist()
print(json.dumps([ops.active_backend("cpu"), layers, found, seen.counts]))
"""


def run(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=580,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_caption_is_the_same_on_the_kernels(random_pair, noisy_draft, make_prompt, tmp_path):
    """With small models and few tokens: the interpreter takes seconds for a layer."""
    models, prompt = (random_pair[0], noisy_draft), make_prompt(5, ("video", 2, 6, 4), 14)
    given, script = tmp_path / "given.pt", tmp_path / "caption.py"
    torch.save((*models, prompt), given)
    script.write_text(CAPTION)
    done = run(script, given, LVSPEC_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    backend, layers, found, seen = json.loads(done.stdout.splitlines()[-1])
    assert backend == "triton"
    # Every layer of every pass is made of the kernels, and of the prompts all but products and
    # attention, which in their last layers are of one row.
    passes, prompts = seen["verify_attention"], 2
    assert seen["rotate_and_write"] == passes + layers
    assert seen["norm_linear"] == passes
    assert seen["norm_gated_linear"] == passes + prompts
    assert seen["linear_add_"] == 2 * (passes + prompts)
    assert seen["rms_norm"] > 0 < seen["rotary_angles"]
    policy, config = AcceptancePolicy.relaxed(), DecodeConfig(gamma=3, max_new_tokens=6)
    expected = generate(*models, prompt, policy=policy, config=config)
    tokens, kinds = found
    assert tokens == expected.tokens.tolist() and kinds == expected.kinds.tolist()
    assert 1 in kinds[0], "nothing was accepted loosely"


def test_kernels_without_an_interpreter_refuse_cpu_tensors(tmp_path):
    """A forced backend that cannot take these tensors says so; the reference does not step in."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch; torch.cuda.is_available = lambda: True\n"
        "from lvspec import ops\n"
        "ops.logit_stats(torch.zeros(1, 1, 8), top_k=1)\n"
    )
    done = run(script, LVSPEC_BACKEND="triton", TRITON_INTERPRET="0")
    assert done.returncode != 0
    assert "expected tensors on a CUDA device, as LVSPEC_BACKEND=triton" in done.stderr


@pytest.mark.slow
def test_cuda_without_triton_says_what_to_install(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "from lvspec.ops import backends, triton_backend\n"
        "print(backends()['triton'].reason)\n"
        "triton_backend._launcher('accept', 'CUDA')()\n"
    )
    done = run(script, LVSPEC_BACKEND="", TRITON_INTERPRET="0")
    assert "triton is not installed: pip install 'triton>=3.6'" in done.stdout
    assert "RuntimeError: lvspec.ops.accept on a CUDA device needs triton" in done.stderr


@pytest.mark.slow
def test_the_reference_can_be_asked_for_by_name(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from lvspec import ops; import torch\n"
        "keys = ('CUDA', 'CPU')\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(ops.active_backend('cuda'), *(has('lvspec::accept', key) for key in keys))\n"
    )
    has_cpp = bool(ops.backends()["cpp"])
    for name, expected in (
        ("reference", "reference False False"),
        ("", f"triton True {has_cpp}"),
    ):
        done = run(script, LVSPEC_BACKEND=name, TRITON_INTERPRET="0")
        assert done.stdout.strip() == expected, done.stderr


def test_active_backend():
    assert ops.active_backend("cpu") == ("cpp" if ops.backends()["cpp"] else "reference")
    assert ops.active_backend("cuda") == "triton"
    assert len(ops.float_dtypes("cpu")) == 4 and len(ops.float_dtypes("cuda")) == 3
