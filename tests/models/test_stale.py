"""A model that has changed between two calls is used as it is, and no plan of before."""

import copy
import gc
import sys
import warnings
import weakref
from contextlib import contextmanager
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from lvspec import AcceptancePolicy, DecodeConfig, Decoder, generate, ops
from lvspec.models import own_passes
from lvspec.models.fingerprint import Fingerprint, modules_of
from lvspec.models.watch import watch_of

peft = pytest.importorskip("peft", reason="needs peft")
hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
ModelHook, add_hook_to_module = hooks.ModelHook, hooks.add_hook_to_module
LoraLayer = peft.tuners.lora.LoraLayer

COUNT, GAMMA = 6, 2
OWN = "own: one operation" if ops.active_backend("cpu") == "cpp" else "own"
pytestmark = [
    pytest.mark.filterwarnings("ignore:lvspec. passes of the:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT reads it
]


def text_of(hf):
    return hf.model.language_model


def replace_activation(hf):
    for layer in text_of(hf).layers:
        layer.mlp.act_fn = nn.Tanh()


def change_epsilon(hf):
    for layer in text_of(hf).layers:
        layer.input_layernorm.variance_epsilon = 3.0


def change_scaling(hf):
    for layer in text_of(hf).layers:
        layer.self_attn.scaling *= 9


def change_frequencies(hf):
    text_of(hf).rotary_emb.inv_freq.mul_(0.2)


def replace_frequencies(hf):
    rotary = text_of(hf).rotary_emb
    rotary.inv_freq = rotary.inv_freq * 0.2


def replace_data_of_frequencies(hf):
    rotary = text_of(hf).rotary_emb
    rotary.inv_freq.data = rotary.inv_freq * 0.2


def scale_angles(hf):
    text_of(hf).rotary_emb.attention_scaling = 2.0


def change_sections(hf):
    """A list in a dict of a config."""
    for layer in text_of(hf).layers:
        sections = layer.self_attn.config.rope_parameters["mrope_section"]
        sections[:] = [0, 0, sum(sections)]


def replace_forward(hf):
    for layer in text_of(hf).layers:
        code = type(layer.mlp).forward
        layer.mlp.forward = MethodType(lambda self, x, code=code: -code(self, x), layer.mlp)


class Negate(ModelHook):
    def post_forward(self, module, output):
        return -output


def hook_by_accelerate(hf):
    for layer in text_of(hf).layers:
        add_hook_to_module(layer.mlp, Negate())


def hook_output(hf):
    for layer in text_of(hf).layers:
        layer.mlp.register_forward_hook(lambda module, args, output: -output)


def hook_input(hf):
    for layer in text_of(hf).layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: -args[0])


@torch.no_grad()
def replace_weights(hf):
    for layer in text_of(hf).layers:
        layer.mlp.down_proj.weight = nn.Parameter(-layer.mlp.down_proj.weight)


@torch.no_grad()
def replace_data(hf):
    for layer in text_of(hf).layers:
        layer.mlp.down_proj.weight.data = -layer.mlp.down_proj.weight


@torch.no_grad()
def change_data_in_place(hf):
    for layer in text_of(hf).layers:
        layer.mlp.down_proj.weight.data.mul_(-1)


@torch.no_grad()
def assign_state(hf):
    state = {
        name: -value if "down_proj" in name else value.clone()
        for name, value in hf.state_dict().items()
    }
    hf.load_state_dict(state, assign=True)


def replace_module(hf):
    for layer in text_of(hf).layers:
        layer.mlp = copy.deepcopy(layer.mlp)
        layer.mlp.down_proj.weight.data.mul_(-1)


def replace_head(hf):
    head = hf.lm_head
    hf.lm_head = nn.Linear(head.in_features, head.out_features, bias=False)
    hf.lm_head.weight.data.copy_(-head.weight.data)


def drop_a_layer(hf):
    text_of(hf).layers[0].forward = lambda hidden_states, **kwargs: hidden_states


def subclass(hf):
    """Another class of the same name, with the same parts."""
    for layer in text_of(hf).layers:
        kind = type(layer.mlp)
        code = {"forward": lambda self, x, kind=kind: -kind.forward(self, x)}
        layer.mlp.__class__ = type(kind.__name__, (kind,), code)


CHANGES = [
    *(replace_activation, change_epsilon, change_scaling, change_frequencies, replace_frequencies),
    *(replace_data_of_frequencies, scale_angles, change_sections, replace_forward),
    *(hook_by_accelerate, hook_output, hook_input, replace_weights, replace_data),
    *(change_data_in_place, assign_state, replace_module, replace_head, drop_a_layer, subclass),
]


@pytest.fixture
def models(random_pair):
    """(target, draft): the same weights, of this test's own."""
    return copy.deepcopy(random_pair[0]), copy.deepcopy(random_pair[0])


@pytest.fixture
def prompt(make_prompt):
    return make_prompt(5, ("video", 2, 6, 4), 3)


@pytest.fixture
def given():
    return {
        "policy": AcceptancePolicy.strict(),
        "config": DecodeConfig(gamma=GAMMA, max_new_tokens=COUNT + 1, eos_ids=()),
    }


@pytest.fixture
def run(models, prompt, given):
    """`run()`: a call of a decoder that is kept."""
    kept = Decoder(*models, **given)
    return lambda: kept.generate(prompt)


@pytest.fixture
def check(run, models, prompt, given, hf_greedy):
    """`check()`: the same, it gives HF's tokens, and the draft proposes those; so does `generate`.

    The draft has the target's weights.
    """

    def compare():
        wanted = hf_greedy(models[0], prompt, COUNT + 1)
        found = run(), generate(*models, prompt, **given)
        for generation in found:
            assert generation.tokens[0].tolist() == wanted
            assert generation.stats.num_accepted == [GAMMA] * (COUNT // (GAMMA + 1))
        return found[0]

    return compare


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_compact", [False, True], ids=["", "16 bits"])
def test_changed_between_calls(run, check, models, change, is_compact):
    """Also where a copy of the weights in 16 bits is read."""
    if is_compact:
        for hf in models:
            hf.half().float()
    before = run()
    assert before.stats.parts["target"]["compact"] == (15 if is_compact and OWN != "own" else 0)
    assert before.stats.passes == {"target": OWN, "draft": OWN}
    for hf in models:
        change(hf)
    after = check()
    assert not after.tokens.equal(before.tokens), "a change that changes nothing tests nothing"


def test_hooks_for_all_modules(run, check):
    before = run()
    handle = register_module_forward_hook(
        lambda module, args, output: -output if type(module).__name__ == "Qwen2MLP" else None
    )
    try:
        after = check()
    finally:
        handle.remove()
    assert not after.tokens.equal(before.tokens)
    assert "hooks for all modules" in after.stats.passes["target"]
    assert run().stats.passes == before.stats.passes


def test_code_of_a_class_that_is_replaced(run, check, models, monkeypatch):
    before = run()
    kind = type(text_of(models[0]).layers[0].mlp)
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: -plain(self, x))
    after = check()
    assert not after.tokens.equal(before.tokens)
    monkeypatch.undo()
    assert run().tokens.equal(before.tokens)


@pytest.mark.slow
def test_a_function_of_a_module_that_is_replaced(run, check, models, monkeypatch):
    """As kernels of other libraries are put in."""
    modeling = sys.modules[type(text_of(models[0])).__module__]
    before = run()
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, *args, **kwargs: (q, k))
    after = check()
    assert not after.tokens.equal(before.tokens)


def test_to_another_type(run, check, models):
    run()
    for hf in models:
        hf.double()
    check()


def test_dropout_of_a_training_that_is_over(run, check, models):
    for hf in models:
        for layer in text_of(hf).layers:
            layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.Dropout(0.9))
    for hf in models:
        hf.train()
    dropping = run()
    assert dropping.stats.passes["target"] == (
        "HF's: Dropout drops out: the model is in training mode"
    )
    for hf in models:
        hf.eval()
    assert check().stats.passes["target"] == "own", "an MLP with other parts is called"
    for hf in models:
        hf.train()
    assert run().stats.passes["target"] == dropping.stats.passes["target"]


@contextmanager
def said(*texts):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(each.message) for each in caught if each.category is RuntimeWarning]
    assert len(messages) == len(texts), messages
    for message, text in zip(messages, texts, strict=True):
        assert text in message


LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


@pytest.fixture
def adapted(models):
    """The same models in PEFT's, with two adapters; the same random numbers in both."""
    found = []
    for hf in models:
        torch.manual_seed(5)
        wrapped = peft.get_peft_model(hf, peft.LoraConfig(lora_alpha=64, **LORA), "one")
        wrapped.add_adapter("two", peft.LoraConfig(lora_alpha=32, lora_dropout=0.5, **LORA))
        found.append(wrapped.eval())
    return found


def lora_layers(wrapped):
    return [module for module in wrapped.modules() if isinstance(module, LoraLayer)]


@pytest.mark.slow
def test_adapters(check, adapted):
    """What PEFT offers to change, one after the other, and each is another model."""
    one = check()
    assert one.stats.passes == {"target": "own", "draft": "own"}
    assert one.stats.parts["target"]["called"] == 4, "layers with an adapter"
    contexts = [wrapped.disable_adapter() for wrapped in adapted]
    for context in contexts:
        context.__enter__()
    none = check()
    for context in contexts:
        context.__exit__(None, None, None)
    assert check().tokens.equal(one.tokens)
    for wrapped in adapted:
        wrapped.set_adapter("two")
    two = check()
    for wrapped in adapted:
        for layer in lora_layers(wrapped):
            layer.scale_layer(5.0)
    scaled = check()
    found = [tuple(each.tokens[0].tolist()) for each in (one, none, two, scaled)]
    assert len(set(found)) == 4
    for wrapped in adapted:
        wrapped.merge_adapter()
    check()
    for wrapped in adapted:
        wrapped.unmerge_adapter()
    check()
    for wrapped in adapted:
        wrapped.delete_adapter("two")
        wrapped.set_adapter("one")
    assert check().tokens.equal(one.tokens)


@pytest.mark.parametrize("is_compact", [False, True], ids=["", "16 bits"])
def test_an_adapter_that_is_merged_and_deleted(models, prompt, given, hf_greedy, is_compact):
    """Its layers go, and what they were put around is the model's own, with other numbers."""
    if is_compact:
        for hf in models:
            hf.half().float()
    plain, found = generate(*models, prompt, **given), []
    for hf in models:
        torch.manual_seed(5)
        wrapped = peft.get_peft_model(hf, peft.LoraConfig(lora_alpha=64, **LORA))
        wrapped.merge_adapter()
        found.append(wrapped.unload())
    assert found[0] is models[0], "the layers themselves"
    after = generate(*models, prompt, **given)
    assert after.tokens[0].tolist() == hf_greedy(models[0], prompt, COUNT + 1)
    assert after.stats.passes == {"target": OWN, "draft": OWN}
    assert not after.tokens.equal(plain.tokens)


def test_adapters_in_training_and_out(run, check, adapted):
    for wrapped in adapted:
        wrapped.set_adapter("two")
        wrapped.train()
    assert "drops out" in run().stats.passes["target"]
    for wrapped in adapted:
        wrapped.eval()
    assert check().stats.passes["target"] == "own"


def test_what_is_unknown_is_said_once(run, models):
    run()
    replace_forward(models[0])
    with said("target are HF's own, slower: Qwen2MLP has another forward than its class"):
        assert run().stats.passes == {
            "target": "HF's: Qwen2MLP has another forward than its class",
            "draft": OWN,
        }
    with said():
        run()
    hook_output(models[1])
    with said("draft are HF's own, slower: Qwen2MLP has hooks"):
        assert run().stats.to_dict()["passes"]["draft"] == "HF's: Qwen2MLP has hooks"


@pytest.mark.parametrize("part", [lambda hf: hf, lambda hf: hf.model])
def test_hooks_around_the_text_model_are_said(run, models, part):
    """They are called for the prompt alone, where HF's own loop calls them for every token."""
    calls = []
    part(models[0]).register_forward_hook(lambda *given: calls.append(0))
    kind = type(part(models[0])).__name__
    with said(f"{kind} of the target has hooks or another forward than its class"):
        run()
    with said():
        run()
    assert len(calls) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda text: setattr(text.layers[1].mlp, "something", 1),
        lambda text: setattr(text.layers[1].mlp, "something", torch.ones(1)),
        lambda text: delattr(text.layers[1].self_attn, "scaling"),
        lambda text: setattr(text.config, "something", 1),
        lambda text: text.config.rope_parameters.update(something=1),
        lambda text: text.layers[1].mlp.register_buffer("something", torch.ones(1)),
        lambda text: text.layers[1].mlp.add_module("something", nn.Identity()),
        lambda text: text.layers[1].train(),
        lambda text: setattr(
            text.layers[1], "__class__", type("Other", (type(text.layers[1]),), {})
        ),
    ],
)
def test_anything_is_seen(models, change):
    text = text_of(models[0])
    known = Fingerprint(modules_of(text))
    assert known.unknown is None and known.holds(modules_of(text))
    change(text)
    assert not known.holds(modules_of(text))


def test_a_state_that_comes_back_is_known(run, models, monkeypatch):
    """An adapter that is turned off and on again is not planned each time; few states are kept."""
    text = text_of(models[0])
    attention = text.layers[0].self_attn
    plain, made = own_passes.plan_of, []
    monkeypatch.setattr(own_passes, "plan_of", lambda *a: made.append(0) or plain(*a))
    scalings = [attention.scaling * factor for factor in (1, 9)]
    found, counts = [], []
    for scaling in scalings * 2:
        attention.scaling = scaling
        found.append(run().tokens.tolist())
        counts.append(len(made))
    assert found[:2] == found[2:] and found[0] != found[1]
    assert 0 < counts[0] < counts[1] == counts[2] == counts[3]
    for factor in range(2, 8):
        attention.scaling = scalings[0] * factor
        run()
    plans = own_passes._KNOWN[text].made
    assert len(plans) == len(watch_of(text).kept) == 4
    replace_weights(models[0])
    run()
    assert len(plans) == 1, "others keep the weights of before alive"


def test_what_does_not_matter_changes_nothing(models, run):
    """Attention of HF's own passes, gradients, hooks of state dicts, our own calls."""
    run()
    before = [watch_of(text_of(hf)).revision for hf in models]
    text = text_of(models[0])
    text.set_attn_implementation("eager")
    text.requires_grad_(False)
    text.register_state_dict_post_hook(lambda *args: None)
    run()
    text.set_attn_implementation("sdpa")
    run()
    assert [watch_of(text_of(hf)).revision for hf in models] == before


@pytest.mark.parametrize(
    "change",
    [lambda hf: None, replace_forward, pytest.param(change_scaling, marks=pytest.mark.slow)],
)
def test_a_model_is_not_kept_alive(random_pair, prompt, change):
    hf = copy.deepcopy(random_pair[0])
    config = DecodeConfig(gamma=GAMMA, max_new_tokens=6, eos_ids=())
    generate(hf, None, prompt, config=config)
    change(hf)
    generate(hf, None, prompt, config=config)
    text = weakref.ref(text_of(hf))
    del hf
    gc.collect()
    assert text() is None
