"""What stands in for small operations of a text model: recognised, in use, and gone afterwards.

As on CUDA devices, but by the specifications of the Triton kernels, which are compared with them in
`test_model_parts.py`. `make test` runs steps on the kernels too, `test_triton.py` a caption.
"""

import copy
import sys
import warnings
from pathlib import Path
from types import MethodType

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lvspec import AcceptancePolicy, DecodeConfig, generate
from lvspec.models.fused import recognise, regions
from lvspec.models.fused.triton import TritonOperations
from lvspec.models.hf_names import CACHE, CACHE_NAMES
from lvspec.models.inputs import check_inputs
from lvspec.models.model import Model
from lvspec.tree import ancestors_from_parents, depths

# The package has a function of the module's name.
recognise_module = sys.modules["lvspec.models.fused.recognise"]
BENCH = Path(__file__).resolve().parents[2] / "bench"
TREE = torch.tensor([-1, 0, 0, 1, 1, 2], dtype=torch.int32)
LAYER = {
    "Qwen2_5_VLAttention": 2,
    "Qwen2MLP": 2,
    "Qwen2_5_VLRMSNorm": 5,
    "Qwen2_5_VLRotaryEmbedding": 1,
    "Qwen2_5_VLDecoderLayer": 2,
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Passes are not recorded, and Triton's operations stand in."""
    monkeypatch.setattr("lvspec.models.fused.active_backend", lambda device_type: "triton")


@pytest.fixture
def target(random_pair):
    return copy.deepcopy(random_pair[0])


def found(hf):
    names = [type(module).__name__ for module, _ in recognised(hf)]
    return {name: names.count(name) for name in names}


def recognised(hf):
    text = Model(hf, "target").text
    return recognise(text.modules(), TritonOperations("cpu"))


class Names(TorchDispatchMode):
    """Names of everything that is dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def step(hf, prompt, fuse):
    """A pass over a tree for two sequences: its output, the cache it leaves, and what was run."""
    model = Model(hf, "target", record=False, fuse=fuse)
    cache = model.new_cache(batch_size=2, capacity=70, num_slots=len(TREE))
    tokens = torch.arange(8, 8 + 2 * len(TREE)).view(2, -1)
    given = (tokens, depths(TREE), ancestors_from_parents(TREE.repeat(2, 1)))
    for sequence in range(2):
        model.prefill(check_inputs(model, prompt), cache, sequence)
    with model.active(), Names() as names:
        output = model.step(*(x.to(model.device) for x in given), cache, scores=True)
    return output, cache, names.seen


def assert_same_step(hf, prompt, atol):
    """The names of what ran with kernels."""
    theirs, their_cache, _ = step(hf, prompt, "none")
    ours, cache, names = step(hf, prompt, "kernels")
    for mine, other in (
        (ours.logits, theirs.logits),
        (ours.masses, theirs.masses),
        (ours.peaks, theirs.peaks),
        (cache.k, their_cache.k),
        (cache.v, their_cache.v),
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=atol)
    return names


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_the_same_step(target, make_prompt, as_on_a_gpu, dtype, atol):
    prompt = make_prompt(5, ("video", 2, 6, 4), 3, dtype=dtype)
    names = assert_same_step(target.to(dtype), prompt, atol)
    counts = {name: names.count(name) for name in names}
    expected = {
        "rms_norm": 3,
        "add_rms_norm": 2,
        "silu_multiply": 2,
        "rotate_and_write": 2,
        "rotary_angles": 1,
        "verify_attention": 2,
    }
    assert counts == counts | expected
    assert not {"scatter_", "rsqrt", "silu", "cos", "neg"} & counts.keys()
    assert not {"_local_scalar_dense", "nonzero", "equal"} & counts.keys(), "nothing is read back"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_the_same_step_on_a_device(target, make_prompt, dtype, atol):
    prompt = make_prompt(5, ("video", 2, 6, 4), 3, dtype=dtype)
    prompt = {name: x.cuda() if torch.is_tensor(x) else x for name, x in prompt.items()}
    names = assert_same_step(target.to("cuda", dtype), prompt, atol)
    counts = {name: names.count(name) for name in names}
    assert counts["rms_norm"] == 3 and counts["add_rms_norm"] == counts["silu_multiply"] == 2
    assert counts["rotate_and_write"] == 2 and counts["rotary_angles"] == 1


def test_a_step_without_data(target, as_on_a_gpu):
    """On tensors that have shapes only, where a value that is read back is an error."""
    model = Model(target, "target", record=False)
    cache = model.new_cache(batch_size=2, capacity=70, num_slots=len(TREE))
    given = torch.ones(2, len(TREE), dtype=torch.long), depths(TREE)
    ancestors = ancestors_from_parents(TREE.repeat(2, 1))
    with model.active():
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Names() as names:
            output = model.step(*given, ancestors, cache, scores=True)
    assert type(output.logits) is FakeTensor and output.logits.shape == (2, len(TREE), 256)
    assert output.peaks.shape == (2, 2, 4, len(TREE))
    assert names.seen.count("rotate_and_write") == 2


def test_nothing_stands_in_if_that_is_asked_for(target, make_prompt, as_on_a_gpu):
    _, _, names = step(target, make_prompt(5), "none")
    assert {"scatter_", "rsqrt", "silu", "cos"} <= set(names) and "rms_norm" not in names


def test_patches_last_as_long_as_they_are_needed(target, make_prompt, as_on_a_gpu):
    modules = list(target.modules())

    def patched():
        return [module for module in modules if "forward" in vars(module)]

    model = Model(target, "target", record=False)
    with model.active():
        inside = patched()
        assert len(inside) == sum(LAYER.values())
        with model.active():  # a target that drafts for itself
            assert patched() == inside
        assert patched() == inside
    assert not patched()
    with pytest.raises(KeyError), model.active():
        raise KeyError
    assert not patched()
    during = []

    class Angles(TorchDispatchMode):
        """Looks whenever a pass begins. (With a hook nothing would be patched.)"""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "rotary_angles" in str(function):
                during.append(len(patched()))
            return function(*args, **(kwargs or {}))

    with Angles():
        step(target, make_prompt(5), "kernels")
    assert during == [sum(LAYER.values())] * 3  # two prompts, one step
    assert not patched()


def test_entering_computes_nothing(target, as_on_a_gpu):
    model = Model(target, "target", record=False)
    with Names() as names, model.active():
        pass
    assert names.seen, "parts are looked for once"
    with Names() as names, Model(target, "target").active():
        pass
    assert not names.seen


def test_weights_that_are_replaced_are_recognised_again(target, make_prompt, as_on_a_gpu):
    """A converted model has other types, and one with another layer another computation."""
    prompt = make_prompt(5)
    step(target, prompt, "kernels")
    norm = target.model.language_model.layers[0].input_layernorm
    norm.weight = nn.Parameter(norm.weight * 2)
    assert_same_step(target, prompt, 2e-5)
    names = assert_same_step(target.bfloat16(), make_prompt(5, dtype=torch.bfloat16), 0.05)
    assert names.count("rotate_and_write") == 2


def changed(module):
    """The same parts, but another computation, by one percent."""
    code = type(module).forward

    def forward(self, *args, **kwargs):
        result = code(self, *args, **kwargs)
        return (result[0] * 1.01, *result[1:]) if isinstance(result, tuple) else result * 1.01

    module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})


def swap_angles(text):
    code = type(text.rotary_emb).forward

    class Changed(type(text.rotary_emb)):
        def forward(self, x, position_ids):
            return code(self, x, position_ids.flip(0))

    text.rotary_emb.__class__ = Changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("modify", "left"),
    [
        (lambda text: changed(text.layers[1].input_layernorm), {"Qwen2_5_VLRMSNorm": 4}),
        (
            lambda text: changed(text.layers[1].post_attention_layernorm),
            {"Qwen2_5_VLRMSNorm": 4, "Qwen2_5_VLDecoderLayer": 1},
        ),
        (lambda text: changed(text.layers[0].mlp), {"Qwen2MLP": 1}),
        (lambda text: changed(text.layers[0].self_attn), {"Qwen2_5_VLAttention": 1}),
        (lambda text: changed(text.layers[0]), {"Qwen2_5_VLDecoderLayer": 1}),
        (swap_angles, {"Changed": 0}),
    ],
)
def test_changed_modules_are_left_alone(target, make_prompt, as_on_a_gpu, modify, left, dtype):
    target.to(dtype)
    assert found(target) == LAYER
    modify(target.model.language_model)
    expected = LAYER | left
    if "Changed" in left:
        del expected["Qwen2_5_VLRotaryEmbedding"], expected["Changed"]
    assert found(target) == expected
    prompt = make_prompt(5, ("video", 2, 6, 4), 3, dtype=dtype)
    assert_same_step(target, prompt, 2e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rms_norm", "Qwen2_5_VLRMSNorm"),
        ("gated_mlp", "Qwen2MLP"),
        ("rotate_and_write", "Qwen2_5_VLAttention"),
        ("add_rms_norm", "Qwen2_5_VLDecoderLayer"),
    ],
)
def test_what_does_not_compile_is_said_once(target, monkeypatch, name, kind):
    """By name, not once a layer; a part that only disagrees is no news."""

    def fails(*given):
        raise RuntimeError(f"{name} does not compile")

    monkeypatch.setattr(TritonOperations, name, fails)
    recognise_module._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning) as said:
        assert kind not in found(target)
        found(target)
    (warning,) = said
    assert str(warning.message) == (
        f"lvspec: {kind} is run by HF's code, slower, for what would stand in for it failed: "
        f"RuntimeError: {name} does not compile"
    )


def test_nothing_is_said_of_parts_that_disagree(target):
    changed(target.model.language_model.layers[0].mlp)
    recognise_module._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(target)["Qwen2MLP"] == 1


def test_a_cache_by_another_name_is_not_counted(target, make_prompt, monkeypatch, as_on_a_gpu):
    """As in transformers 5.24, when only `past_key_values` was known: the patch was called and left
    everything to HF's code."""
    other = next(name for name in CACHE_NAMES if name != CACHE)
    monkeypatch.setattr(recognise_module, "CACHE", other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "Qwen2_5_VLAttention" not in found(target)
        model = Model(target, "target", record=False)
        cache = model.new_cache(batch_size=1, capacity=8, num_slots=1)
        assert model.parts(cache)["attention"] == 0 < model.parts(cache)["norm"]


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_angles_that_follow_the_length_are_left_alone(target, rope_type):
    target.model.language_model.rotary_emb.rope_type = rope_type
    assert "Qwen2_5_VLRotaryEmbedding" not in found(target)


def test_hooks_are_called(target, make_prompt, as_on_a_gpu):
    """Of every module, also of the norm that is otherwise one with a sum."""
    text, calls = target.model.language_model, []
    prompt = make_prompt(5)
    plain, _, names = step(target, prompt, "kernels")
    assert names.count("add_rms_norm") == 2
    parts = (text.layers[0], text.layers[1].post_attention_layernorm, text.norm)
    hooks = [part.register_forward_hook(lambda *given: calls.append(given[0])) for part in parts]
    hooked, _, names = step(target, prompt, "kernels")
    for hook in hooks:
        hook.remove()
    assert [calls.count(part) for part in parts] == [3, 3, 3]  # two prompts, one step
    assert names.count("add_rms_norm") == 0, "with hooks nothing stands in for anything"
    torch.testing.assert_close(hooked.logits, plain.logits, rtol=0, atol=2e-5)


def test_patches_of_others_stay(target, make_prompt, as_on_a_gpu):
    """As of libraries that move weights: on a norm, before and after it was recognised."""
    layer = target.model.language_model.layers[0]
    norm, code = layer.post_attention_layernorm, type(layer.post_attention_layernorm).forward
    for recognised_before in (True, False):
        if not recognised_before:
            layer.mlp.gate_proj.weight = nn.Parameter(layer.mlp.gate_proj.weight.clone())
        else:
            step(target, make_prompt(5), "kernels")
        calls = []
        norm.forward = MethodType(lambda self, x: calls.append(1) or 2 * code(self, x), norm)  # noqa: B023
        theirs = norm.forward
        assert_same_step(target, make_prompt(5), 1e-4)
        assert norm.forward is theirs and len(calls) == 6  # with and without kernels
        del norm.forward


class Scaled(nn.Module):
    """A linear layer that is none of torch's, as quantised ones are."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = nn.Parameter(layer.weight / 4), layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 4, self.bias)


def test_other_linear_layers(target, make_prompt, as_on_a_gpu):
    for module in list(target.model.language_model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Scaled(child))
    assert found(target) == LAYER
    assert_same_step(target, make_prompt(5), 2e-5)


def test_weights_elsewhere_are_left_alone(target):
    assert not found(copy.deepcopy(target).double().to("meta"))
    assert not recognise(target.modules(), TritonOperations("cuda"))


@pytest.fixture
def compile_counter(monkeypatch):
    """Regions are compiled by Dynamo alone, which counts them."""
    counter = CompileCounter()
    made = {}

    def compiled(code):
        if code not in made:
            made[code] = torch.compile(code, dynamic=False, backend=counter)
        return made[code]

    torch._dynamo.reset()
    monkeypatch.setattr(regions, "_compiled", compiled)
    return counter


def decode(pair, prompt, fuse):
    config = DecodeConfig(gamma=4, max_new_tokens=20, eos_ids=(), fuse=fuse)
    return generate(*pair, prompt, policy=AcceptancePolicy.strict(), config=config)


@pytest.mark.slow
def test_regions_are_compiled_once_a_shape(random_pair, noisy_draft, make_prompt, compile_counter):
    """Not once a layer; a prompt of another length compiles nothing."""
    pair = [copy.deepcopy(model) for model in (random_pair[0], noisy_draft)]
    prompts = [make_prompt(5, ("video", 2, 6, 4), 3), make_prompt(7, seed=1)]
    plain, warm_up = [decode(pair, prompt, "none").tokens for prompt in prompts], []
    for prompt, expected in zip(prompts, plain, strict=True):
        found = decode(pair, prompt, "compile")
        assert torch.equal(found.tokens, expected)
        warm_up.append(found.stats.seconds["warm-up"])
        # A norm, a gated MLP and angles, for the draft's first pass, its others, and the target's.
        assert compile_counter.frame_count == 3 * 3
    assert 0 <= warm_up[1] < warm_up[0] / 2, "compiling is warm-up, and is done once"
    assert not any("forward" in vars(module) for model in pair for module in model.modules())


def test_compiled_passes_are_not_recorded(target):
    assert Model(target, "target", fuse="compile").recorder is None
    assert Model(target, "target", fuse="none").recorder is not None


@pytest.mark.slow
def test_regions_of_the_compiler_that_is_used(random_pair, make_prompt):
    """torch.compile's own, which needs a C++ compiler here."""
    torch._dynamo.reset()
    pair, prompt = [copy.deepcopy(random_pair[0])] * 2, make_prompt(5, ("video", 2, 6, 4), 3)
    expected = decode(pair, prompt, "none")
    assert torch.equal(decode(pair, prompt, "compile").tokens, expected.tokens)
