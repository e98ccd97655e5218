"""fp8 weights: what a layer of them computes, and how a model of any size gets them."""

import copy
import gc
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from lvspec import AcceptancePolicy, DecodeConfig, generate, load_pair, quantize
from lvspec.models import float8_linear
from lvspec.models.float8_linear import Float8Linear
from lvspec.models.head import draft_head
from lvspec.models.model import Model
from lvspec.models.stored import stored_bytes
from lvspec.ops.scaled_linear import MAX_ROWS, converts_from_float8
from lvspec.reference.float8 import FLOAT8, float8_scale, narrow_to_float8

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STRICT = AcceptancePolicy.strict()


def layer_of(dtype=torch.float32, *, outputs=37, size=96, with_bias=True):
    layer = nn.Linear(size, outputs, bias=with_bias).to(dtype)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-2, 1, outputs)[:, None])
    return layer


def plain(layer, dtype):
    """An ordinary layer of the weights that it stands for."""
    found = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    found.weight = nn.Parameter(layer.expanded(dtype))
    if layer.bias is not None:
        found.bias = nn.Parameter(layer.bias.to(dtype))
    return found


def layers_of(model):
    text = model.model.language_model
    return {name: part for name, part in text.named_modules() if isinstance(part, nn.Linear)}


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_factors():
    """Worked by hand: the smallest power of two that brings the largest number to 448 or below."""
    x = torch.tensor([[448.0, 1], [449, 1], [-224, 3], [0, 0], [torch.inf, 1], [torch.nan, 1]])
    assert float8_scale(x, 1).tolist() == [1, 2, 0.5, 1, 1, 1]
    assert float8_scale(x[:3], 1, headroom=2).tolist() == [2, 4, 1]
    assert float8_scale(x[:3], (0, 1)).item() == 2


def test_numbers():
    x = torch.tensor([0.0, 1.06, -1.07, 450.0, torch.inf, -1e30, torch.nan])
    found = narrow_to_float8(x, torch.tensor(1.0)).float()
    assert found[:-1].tolist() == [0, 1, -1.125, 448, 448, -448] and found[-1].isnan()
    assert narrow_to_float8(x, torch.tensor(4.0)).float()[3] == 112


@torch.no_grad()
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_it_computes_what_a_plain_layer_of_its_weights_does(dtype, with_bias, monkeypatch):
    """Few rows and many, in one tile and in several."""
    layer = layer_of(dtype, with_bias=with_bias)
    before = layer.weight.double()
    Float8Linear.take_over(layer)
    assert layer.weight.dtype == FLOAT8 and type(layer) is Float8Linear
    exact = layer.expanded(torch.float64)
    assert exact.equal(layer.expanded(dtype).double()), "factors round nothing"
    assert ((exact - before).abs() <= before.abs() / 16 + before.abs().amax(1, True) / 1e5).all()
    assert not exact.equal(before)
    for rows in (1, 13, MAX_ROWS, MAX_ROWS + 1):
        x = torch.randn(1, rows, 96).to(dtype)
        wanted = plain(layer, torch.float64)(x.double())
        for tile in (float8_linear.TILE_BYTES, 5 * 96 * dtype.itemsize):
            monkeypatch.setattr(float8_linear, "TILE_BYTES", tile)
            got = layer(x)
            assert got.dtype == dtype and got.shape == (1, rows, 37)
            bound = 4 * max(torch.finfo(dtype).eps, 1e-15) * wanted.abs().max()
            assert (got - wanted).abs().max() <= bound
        monkeypatch.undo()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
def test_who_multiplies(monkeypatch, backend):
    """The bytes are read as they are for few rows, where a kernel of lvspec's computes."""
    monkeypatch.setattr(
        sys.modules["lvspec.ops.scaled_linear"], "active_backend", lambda device_type: backend
    )
    layer = layer_of()
    Float8Linear.take_over(layer)
    for rows, dtype in ((1, torch.float32), (MAX_ROWS, torch.float32), (1, torch.float64)):
        is_ours = dtype == torch.float32 and backend != "reference"
        layer.to(dtype)
        with Names() as names:
            layer(torch.randn(rows, 96, dtype=dtype))
            assert ("scaled_linear" in names.seen) == is_ours
    layer.to(torch.float32)
    with Names() as names:
        layer(torch.randn(MAX_ROWS + 1, 96))
        assert "scaled_linear" not in names.seen


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((8, 9), True)])
def test_what_converts_from_float8(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert converts_from_float8.__wrapped__(torch.device("cuda", 0)) == expected
    assert converts_from_float8.__wrapped__(torch.device("cpu"))


def test_conversions_leave_the_weights():
    layer = layer_of(outputs=600)
    Float8Linear.take_over(layer)
    bits, scale = layer.weight.view(torch.uint8).clone(), layer.scale.clone()
    for convert in (nn.Module.bfloat16, nn.Module.double, nn.Module.half, copy.deepcopy):
        layer = convert(layer)
        assert layer.weight.view(torch.uint8).equal(bits) and layer.scale.equal(scale)
    assert layer.bias.dtype == torch.float16
    assert layer.to("meta").weight.dtype == FLOAT8


def test_one_layer_after_the_other(random_pair):
    """The weights of a layer are gone when the next is quantised, be plans of passes there."""
    model = copy.deepcopy(random_pair[0])
    assert Model(model, "target").made.plan is not None
    layers = {**layers_of(model), "lm_head": model.lm_head}
    before = {name: weakref.ref(layer.weight) for name, layer in layers.items()}
    tied = model.get_input_embeddings().weight
    alive, take_over = [], Float8Linear.take_over

    def counting(layer):
        gc.collect()
        alive.append(sum(reference() is not None for reference in before.values()))
        take_over(layer)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Float8Linear, "take_over", counting)
        quantize(model, "fp8")
    assert alive == [*range(len(layers), 0, -1)]
    assert before["lm_head"]() is tied, "which is the embedding too"
    assert model.get_input_embeddings().weight is tied and model.lm_head.weight is not tied


def onevision_72b():
    """LLaVA-OneVision-72B as it is published, on tensors without data."""
    config = LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 152000,
            "tie_word_embeddings": False,
        }
    )
    with torch.device("meta"):
        return LlavaOnevisionForConditionalGeneration(config).bfloat16().eval()


@pytest.mark.slow
def test_72b_fits_into_one_gpu():
    """72.7 GB a pass, beside the caches of eight captions at 16k, in 0.9 of 139 GiB."""
    model = onevision_72b()
    target = Model(model, "target")
    assert target.step_bytes == pytest.approx(142.9e9, rel=1e-3)
    quantize(model, "fp8", head=False)
    assert target.step_bytes == pytest.approx(72.7e9, rel=1e-3)
    assert type(model.lm_head) is nn.Linear
    whole = sum(map(stored_bytes, (*model.parameters(), *model.buffers())))
    assert whole < 77e9
    with torch.device("meta"):
        cache = target.new_cache(batch_size=8, capacity=16384, num_slots=13)
    caches = sum(map(stored_bytes, (cache.k, cache.v)))
    assert caches == 8 * 16384 * 320 * 1024
    assert whole + caches < 0.9 * 139 * 2**30


@pytest.mark.parametrize("tree", [None, "specvlm"])
def test_strict_is_the_quantised_targets_greedy(pair, make_prompt, hf_greedy, tree):
    """As HF's `generate` decodes it; and not what the target says without."""
    target, draft = copy.deepcopy(pair[0]), pair[1]
    prompt = make_prompt(3, ("video", 4, 6, 6), 5, dtype=torch.float64)
    before = hf_greedy(target, prompt, 40)
    quantize(target, "fp8")
    wanted = hf_greedy(target, prompt, 40)
    assert wanted != before
    config = DecodeConfig(gamma=4, tree=tree, max_new_tokens=40, eos_ids=())
    found = generate(target, draft, prompt, policy=STRICT, config=config)
    assert found.tokens[0].tolist() == wanted
    assert found.stats.passes["target"] == "own"


def test_equal_to_a_plain_model_of_its_weights(random_pair, make_prompt, hf_greedy):
    """HF's greedy tokens of an ordinary model, in which nothing is lvspec's."""
    target = quantize(copy.deepcopy(random_pair[0]), "fp8")
    ordinary = copy.deepcopy(random_pair[0])
    for name, layer in {**layers_of(target), "": target.lm_head}.items():
        text = ordinary.model.language_model
        theirs = text.get_submodule(name) if name else ordinary.lm_head
        theirs.weight = nn.Parameter(layer.expanded(torch.float32))
    prompt = make_prompt(3, ("video", 4, 6, 6), 5, seed=1)
    config = DecodeConfig(gamma=4, max_new_tokens=30, eos_ids=())
    found = generate(target.double(), "self", as_double(prompt), policy=STRICT, config=config)
    assert found.tokens[0].tolist() == hf_greedy(ordinary.double(), as_double(prompt), 30)


def as_double(prompt):
    return {k: v.double() if v.is_floating_point() else v for k, v in prompt.items()}


def test_load_pair(random_pair_folders, make_prompt, hf_greedy):
    pair = load_pair(*random_pair_folders, target_weights="fp8", draft_weights="fp8")
    kinds = {name: type(layer) for name, layer in layers_of(pair.target).items()}
    assert {*kinds.values()} == {Float8Linear}
    assert type(pair.target.lm_head) is nn.Linear and type(pair.draft.lm_head) is Float8Linear
    prompt = make_prompt(3, ("video", 4, 6, 6), 5)
    config = DecodeConfig(gamma=4, max_new_tokens=20, eos_ids=())
    found = generate(pair.target, pair.draft, prompt, policy=STRICT, config=config)
    pair.target.generation_config.eos_token_id = None
    assert found.tokens[0].tolist() == hf_greedy(pair.target, prompt, 20)
    with pytest.raises(ValueError, match="^target_weights, device_map: expected one of them"):
        load_pair(*random_pair_folders, target_weights="fp8", device_map="auto")


def test_layers_that_move_about(random_pair):
    model = copy.deepcopy(random_pair[0])
    layers_of(model)["layers.1.mlp.up_proj"]._hf_hook = object()
    with pytest.raises(ValueError, match="^model: expected weights that stay .* layers.1.mlp.up"):
        quantize(model, "fp8")


@torch.no_grad()
def test_some_rows_of_a_head(random_pair):
    """In float8 as well, and as the head is now."""
    model = quantize(copy.deepcopy(random_pair[0]), "fp8")
    ids, hidden = tuple(range(3, 99, 5)), torch.randn(1, 2, 256)
    some = draft_head(model.lm_head, 256, ids)
    assert type(some.head) is Float8Linear
    torch.testing.assert_close(some(hidden), model.lm_head(hidden)[..., list(ids)])
    model.lm_head.scale.mul_(2)
    assert draft_head(model.lm_head, 256, ids) is some
    torch.testing.assert_close(some(hidden), model.lm_head(hidden)[..., list(ids)])
