"""A pass of lvspec's own is one of the model as it is, and nothing of it stays behind."""

import copy
import gc
import weakref
from types import MethodType

import pytest
import torch
from passes import assert_same, check, clip, step, text_of
from torch import nn

from lvspec import ops
from lvspec.models.model import Model

HAS_CPP = ops.active_backend("cpu") == "cpp"
ONE = "own: one operation" if HAS_CPP else "own"
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="needs the C++ operations")
as_others = pytest.mark.filterwarnings("ignore:lvspec. passes of the:RuntimeWarning")


@torch.no_grad()
def double_in_place(hf):
    text_of(hf).layers[0].mlp.down_proj.weight.mul_(2)


@torch.no_grad()
def double_data(hf):
    text_of(hf).layers[0].mlp.down_proj.weight.data.mul_(2)


@torch.no_grad()
def replace(hf):
    mlp = text_of(hf).layers[0].mlp
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight * 2)


@torch.no_grad()
def replace_data(hf):
    weight = text_of(hf).layers[0].self_attn.q_proj.weight
    weight.data = weight.data * 2


@torch.no_grad()
def load_state(hf):
    hf.load_state_dict({name: x * 1.1 for name, x in hf.state_dict().items()})


def replace_head(hf):
    hf.lm_head = nn.Linear(256, 256, bias=False)


@torch.no_grad()
def scale_norm(hf):
    text_of(hf).layers[1].input_layernorm.weight.mul_(3)


# Activations thrice as large have errors thrice as large.
ATOL = 6e-5

CHANGES = (
    double_in_place,
    double_data,
    replace,
    replace_data,
    load_state,
    replace_head,
    scale_norm,
)


@pytest.mark.parametrize("is_representable", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_used(target, make_prompt, change, is_representable):
    """Also where 16 bits hold them and a copy is read."""
    if is_representable:
        target.half().float()
    prompt = clip(make_prompt)
    before = step(target, prompt)
    change(target)
    check(target, prompt, ATOL)
    assert (step(target, prompt)[0].logits - before[0].logits).abs().max() > 0.01


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_used_as_on_a_gpu(target, make_prompt, as_on_a_gpu, change):
    prompt = clip(make_prompt)
    before = step(target, prompt)
    change(target)
    check(target, prompt, ATOL)
    assert (step(target, prompt)[0].logits - before[0].logits).abs().max() > 0.01


def test_a_model_that_is_converted(target, make_prompt):
    check(target, clip(make_prompt))
    for dtype, atol in ((torch.float64, 1e-12), (torch.bfloat16, 0.05), (torch.float32, 2e-5)):
        names = check(target.to(dtype), clip(make_prompt, dtype=dtype), atol)
        assert ("text_pass" in names) == (HAS_CPP and dtype == torch.float32)


@needs_cpp
def test_copies_of_half_the_bytes(target, make_prompt):
    """Only where they are exact; the same numbers."""
    prompt = clip(make_prompt)
    assert Model(target, "target").made.parts["compact"] == 0
    before = step(target.half().float(), prompt)
    assert Model(target, "target").made.parts["compact"] == 2 * 7 + 1, "seven a layer, and the head"
    assert_same(before, step(target, prompt, "none"), 2e-5)


@as_others
def test_hooks_are_called(target, make_prompt):
    """Of every module; with one nothing stands in for anything."""
    text, calls = text_of(target), []
    plain = step(target, clip(make_prompt))
    parts = (text.layers[0], text.layers[1].mlp.gate_proj, text.norm)
    hooks = [part.register_forward_hook(lambda *given: calls.append(given[0])) for part in parts]
    hooked = step(target, clip(make_prompt))
    assert Model(target, "target").made.obstacle.endswith("has hooks")
    for hook in hooks:
        hook.remove()
    assert [calls.count(part) for part in parts] == [2, 2, 2]  # a prompt, a step
    assert "text_pass" not in hooked[2] and "rsqrt" in hooked[2]
    assert_same(hooked, plain, 2e-5)
    assert Model(target, "target").made.passes == ONE


@as_others
def test_code_of_others_is_called(target, make_prompt):
    """As of libraries that move weights: it stays, and what it depends on is not known."""
    step(target, clip(make_prompt))
    norm, calls = text_of(target).layers[0].post_attention_layernorm, []
    code = type(norm).forward
    norm.forward = MethodType(lambda self, x: calls.append(1) or 2 * code(self, x), norm)
    theirs = norm.forward
    check(target, clip(make_prompt), 1e-4)
    assert norm.forward is theirs and len(calls) == 4
    assert "another forward than its class" in Model(target, "target").made.obstacle


def test_angles_that_follow_the_length_are_hf_own(target, make_prompt, monkeypatch):
    """Their module is called in every pass; the rest is lvspec's."""
    rotary, calls = text_of(target).rotary_emb, []
    rotary.rope_type = "dynamic"
    code = type(rotary).forward

    def counted(self, *given):
        calls.append(1)
        return code(self, *given)

    monkeypatch.setattr(type(rotary), "forward", counted)
    model = Model(target, "target")
    with model.held():
        assert model.made.plan.called == (rotary,) and model.made.cpu is None
    calls.clear()
    ours = step(target, clip(make_prompt))
    assert len(calls) == 2, "a prompt and a pass"
    assert_same(ours, step(target, clip(make_prompt), "none"), 2e-5)
    assert "rotate_and_write" in ours[2] and "text_pass" not in ours[2]


def test_nothing_stays_on_the_model(target, make_prompt, monkeypatch):
    """No forward of ours, whatever happens."""
    modules, seen = list(target.modules()), []

    def replaced():
        return [module for module in modules if "forward" in vars(module)]

    def fails(*given):
        seen.extend(replaced())
        raise KeyError

    step(target, clip(make_prompt))
    assert not replaced()
    monkeypatch.setattr("lvspec.models.text_pass.ops.rotate_and_write", fails)
    with pytest.raises(KeyError):
        step(target, clip(make_prompt))
    assert text_of(target) in seen and not replaced()
    assert {type(module) for module in seen} <= {type(text_of(target)), nn.Conv3d}


def test_a_plan_goes_with_the_model(random_pair, make_prompt):
    for dtype in (torch.float32, torch.bfloat16):
        hf = copy.deepcopy(random_pair[0]).to(dtype)
        step(hf, clip(make_prompt, dtype=dtype))
        assert Model(hf, "target").made.plan is not None
        text, weight = weakref.ref(text_of(hf)), weakref.ref(hf.lm_head)
        del hf
        gc.collect()
        assert text() is None and weight() is None


def test_weights_of_before_are_not_kept(target, make_prompt):
    step(target, clip(make_prompt))
    old = weakref.ref(text_of(target).layers[0].mlp.down_proj.weight)
    replace(target)
    step(target, clip(make_prompt))
    gc.collect()
    assert old() is None
