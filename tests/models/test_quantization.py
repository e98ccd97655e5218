"""quantize: a draft in fewer bytes, whose target's own tokens stay, and a target in fewer bytes.

int8 and int4 need torchao, an optional requirement. `test_float8_linear.py` has the layers of fp8.
"""

import copy
import os
import subprocess
import sys
import warnings
from types import ModuleType

import pytest
import torch
from passes import assert_same, clip, step

from lvspec import AcceptancePolicy, DecodeConfig, generate, load_pair, quantize
from lvspec.models.byte_linear import ByteLinear
from lvspec.models.float8_linear import Float8Linear
from lvspec.models.head import draft_head
from lvspec.models.model import Model
from lvspec.models.stored import stored_bytes
from lvspec.phases.draft.factory import cost_ratio_of_bytes, draft_source

STRICT = AcceptancePolicy.strict()
KINDS = ["int8", "fp8"]


@pytest.fixture
def torchao(request):
    """What is done by it needs it."""
    given = getattr(request.node, "callspec", None)
    if given is None or given.params.get("weights") != "fp8":
        pytest.importorskip("torchao.quantization", reason="needs torchao (lvspec[quant])")


@pytest.fixture
def draft(noisy_draft):
    return copy.deepcopy(noisy_draft)


def config(**options):
    return DecodeConfig(**{"gamma": 4, "max_new_tokens": 30, "eos_ids": (), **options})


def linears(model):
    layers = model.model.language_model.named_modules()
    return {name: part for name, part in layers if isinstance(part, torch.nn.Linear)}


@pytest.mark.parametrize("weights", KINDS)
def test_what_is_quantised(torchao, draft, weights):
    before, hidden = copy.deepcopy(draft), torch.randn(1, 3, 256)
    assert quantize(draft, weights) is draft
    names = [*linears(before)]
    assert len(names) == 2 * 7
    for name in names:
        ours, theirs = linears(draft)[name], linears(before)[name]
        assert (type(ours) is Float8Linear) == (weights == "fp8")
        assert (type(ours.weight) is torch.nn.Parameter) == (weights == "fp8")
        x = torch.randn(2, 3, theirs.in_features)
        error = (ours(x) - theirs(x)).abs().max() / theirs(x).abs().max()
        assert 0 < error < {"int8": 0.02, "fp8": 0.08}[weights]
    error = (draft.lm_head(hidden) - before.lm_head(hidden)).abs().max()
    assert 0 < error < 0.08 * before.lm_head(hidden).abs().max()
    untouched = {name: x for name, x in before.named_parameters() if "visual" in name}
    untouched["embedding"] = before.get_input_embeddings().weight
    ours = dict(draft.named_parameters()) | {"embedding": draft.get_input_embeddings().weight}
    for name, theirs in untouched.items():
        assert type(ours[name]) is torch.nn.Parameter and ours[name].equal(theirs), name


@pytest.mark.parametrize("weights", KINDS)
def test_bytes(torchao, draft, weights):
    """A byte a weight and four for every row's factor; for int8 one more for its zero point."""
    model = Model(draft, "draft")
    before = model.step_bytes
    layers = [*linears(draft).values(), draft.lm_head]
    count = sum(layer.weight.numel() for layer in layers)
    rows = sum(layer.out_features for layer in layers)
    quantize(draft, weights)
    assert model.step_bytes == before - 3 * count + {"int8": 5, "fp8": 4}[weights] * rows
    assert stored_bytes(draft.get_input_embeddings().weight) == 256 * 256 * 4
    target = Model(copy.deepcopy(draft), "target")
    ratio = cost_ratio_of_bytes(target, draft_source(target, model, config()))
    assert ratio == 1.0, "a copy has the same bytes"


@pytest.mark.parametrize("options", [{}, {"tree": "specvlm"}, {"draft_vocab": range(5, 250)}])
@pytest.mark.parametrize("weights", KINDS)
def test_strict_is_greedy(torchao, random_pair, draft, make_prompt, hf_greedy, weights, options):
    target, prompt = random_pair[0], make_prompt(3, ("video", 4, 6, 6), 5)
    quantize(draft, weights)
    found = generate(target, draft, prompt, policy=STRICT, config=config(**options))
    assert found.tokens[0].tolist() == hf_greedy(target, prompt, 30)
    assert sum(found.stats.num_accepted) > 5, "it drafts like what it was made of"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(torchao, draft, make_prompt, dtype):
    quantize(draft.to(dtype), "int8")
    prompt = make_prompt(3, ("video", 2, 4, 4), 5, dtype=dtype)
    found = generate(draft, draft, prompt, policy=STRICT, config=config())
    assert found.tokens.shape == (1, 30) and found.stats.tau > 3


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_read_the_bytes(torchao, draft, monkeypatch, dtype, backend):
    """What torchao makes is what kernels expect."""
    with monkeypatch.context() as patches:
        for name in ("lvspec.models.byte_linear", "lvspec.ops.scaled_linear"):
            patches.setattr(sys.modules[name], "active_backend", lambda device_type: backend)
        model = quantize(draft.to(dtype), "int8")
        layers = (*linears(model).values(), model.lm_head)
        assert {type(layer) for layer in layers} == {ByteLinear}
        ours = model.lm_head
        theirs = copy.deepcopy(ours)
        theirs.__class__ = torch.nn.Linear
        x = torch.randn(1, 3, 256, dtype=dtype)
        rtol = 4 * torch.finfo(dtype).eps
        size = theirs(x).abs().max().item()
        torch.testing.assert_close(ours(x), theirs(x), rtol=rtol, atol=8 * rtol * size)


@pytest.mark.parametrize("weights", KINDS)
def test_quantised_layers_are_called(torchao, draft, make_prompt, weights):
    """They alone; norms, rotation and gate around them are lvspec's, and the numbers HF's."""
    model = Model(draft, "draft")
    assert model.made.parts["called"] == 0
    quantize(draft, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.made.passes == "own"
    assert [*map(id, model.made.plan.called)] == [*map(id, linears(draft).values())]
    ours, theirs = step(draft, clip(make_prompt)), step(draft, clip(make_prompt), "none")
    assert_same(ours, theirs, 2e-5)
    assert {"rotate_and_write", "silu_multiply", "rms_norm"} <= set(ours[2])


INTERPRETED = """
import sys
import warnings
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from lvspec import AcceptancePolicy, DecodeConfig, generate, load_pair

class Seen(TorchDispatchMode):
    names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

torch.set_num_threads(1)
target, draft, prompt, weights, cache_dtype, out = sys.argv[1:]
pair = load_pair(target, draft, draft_weights=weights)
config = DecodeConfig(gamma=2, max_new_tokens=4, eos_ids=(), cache_dtype=cache_dtype)
with Seen():
    found = generate(
        pair.target, pair.draft, torch.load(prompt), policy=AcceptancePolicy.strict(), config=config
    )
torch.save([found.tokens, sorted(Seen.names)], out)
"""


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("weights", KINDS)
def test_on_the_kernels(torchao, random_pair_folders, random_pair, make_prompt, tmp_path, weights):
    """The whole loop with a quantised draft in the interpreter; with fp8, so are the caches."""
    script, prompt, out = (tmp_path / name for name in ("script.py", "prompt.pt", "out.pt"))
    script.write_text(INTERPRETED)
    given = make_prompt(2, ("video", 2, 4, 4), 2)
    torch.save(given, prompt)
    cache_dtype = "fp8" if weights == "fp8" else "auto"
    command = [sys.executable, script, *random_pair_folders, prompt, weights, cache_dtype, out]
    done = subprocess.run(
        [*map(str, command)],
        env={**os.environ, "LVSPEC_BACKEND": "triton", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    tokens, names = torch.load(out)
    config = DecodeConfig(max_new_tokens=4, eos_ids=(), cache_dtype=cache_dtype)
    assert tokens.equal(generate(random_pair[0], None, given, config=config).tokens)
    assert {"scaled_linear", "silu_multiply", "rotate_and_write"} <= set(names)
    assert ("write_float8" in names) == (cache_dtype == "fp8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_rows_of_a_quantised_head(torchao, draft, dtype):
    """As they are used: the products of the chosen ids are the quantised ones."""
    quantize(draft.to(dtype), "int8")
    ids = tuple(range(3, 99, 5))
    hidden = torch.randn(1, 2, 256, dtype=dtype)
    with torch.no_grad():
        whole = draft.lm_head(hidden)[..., list(ids)]
        some = draft_head(draft.lm_head, 256, ids)(hidden)
    torch.testing.assert_close(
        some, whole, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2
    )


def test_load_pair(torchao, random_pair_folders, random_pair, make_prompt, hf_greedy):
    pair = load_pair(*random_pair_folders, draft_weights="int8")
    assert all(type(x) is torch.nn.Parameter for x in pair.target.parameters())
    assert type(pair.draft.lm_head.weight).__name__ == "Int8Tensor"
    prompt = make_prompt(3, ("video", 4, 6, 6), 5)
    found = generate(pair.target, pair.draft, prompt, policy=STRICT, config=config())
    assert found.tokens[0].tolist() == hf_greedy(random_pair[0], prompt, 30)


@pytest.mark.parametrize("weights", KINDS)
def test_twice(torchao, draft, weights):
    quantize(draft, weights)
    with pytest.raises(
        ValueError, match="^model: expected weights that are not quantised yet, got"
    ):
        quantize(draft, "fp8")


def test_wrong_arguments(draft):
    with pytest.raises(ValueError, match="^weights: expected one of int8, int4, fp8, got 'int3'"):
        quantize(draft, "int3")
    with pytest.raises(TypeError, match="^model: expected a transformers model, got Linear"):
        quantize(torch.nn.Linear(2, 2), "int8")
    with pytest.raises(
        ValueError, match=r"^weights: expected int8 or fp8 for a model of torch.float32 on cpu"
    ):
        quantize(draft, "int4")


def test_int4_needs_whole_groups(random_pair):
    draft = copy.deepcopy(random_pair[0])
    draft.model.language_model.layers[1].mlp.down_proj = torch.nn.Linear(200, 256)
    message = "^weights: expected rows of a multiple of 128 .* got 200 in layers.1.mlp.down_proj"
    with pytest.raises(ValueError, match=message):
        quantize(draft, "int4")


class _FakeTorchao(ModuleType):
    """What torchao is asked, without it."""

    def __init__(self):
        super().__init__("torchao.quantization")
        self.calls = []

    def quantize_(self, module, config):
        self.calls.append((module, *config))

    def __getattr__(self, name):
        if not name.endswith("WeightOnlyConfig"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return lambda **options: (name, options)


@pytest.fixture
def fake_torchao(monkeypatch):
    package, fake = ModuleType("torchao"), _FakeTorchao()
    package.quantization = fake
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    return fake


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("int8", "Int8WeightOnlyConfig"),
        ("int4", "Int4WeightOnlyConfig"),
    ],
)
def test_what_torchao_is_asked(fake_torchao, draft, monkeypatch, weights, name):
    monkeypatch.setattr("lvspec.models.quantize._check_int4", lambda *arguments: None)
    quantize(draft, weights)
    wanted = [*linears(draft).values(), *([draft.lm_head] if weights != "int4" else [])]
    assert [module for module, _, _ in fake_torchao.calls] == wanted
    for _, asked, options in fake_torchao.calls:
        assert asked == name and options["set_inductor_config"] is False
        assert options.get("group_size") == (128 if weights == "int4" else None)


def test_without_torchao(draft, random_pair_folders, monkeypatch):
    before = [x.clone() for x in draft.parameters()]
    monkeypatch.setitem(sys.modules, "torchao", None)
    message = r"^weights: expected torchao >= 0.18 for 'int8' \(pip install lvspec\[quant\]\), got"
    with pytest.raises(ImportError, match=message):
        quantize(draft, "int8")
    assert all(x.equal(y) for x, y in zip(draft.parameters(), before, strict=True))
    with pytest.raises(ImportError, match=message):
        load_pair(*random_pair_folders, draft_weights="int8")


def test_an_old_torchao(draft, monkeypatch):
    package = ModuleType("torchao")
    package.quantization = ModuleType("torchao.quantization")
    package.quantization.quantize_ = None
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.quantization", package.quantization)
    with pytest.raises(ImportError, match="^weights: .* no attribute 'Int8WeightOnlyConfig'"):
        quantize(draft, "int8")
