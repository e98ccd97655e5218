"""What a plan of a text model is made of: what is called, what is refused, and with which words."""

import copy
import gc
import weakref

import pytest
import torch
from passes import assert_same, check, clip, step, text_of
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

import lvspec
from lvspec import ops
from lvspec.models import fingerprint
from lvspec.models.merged import merge, separate
from lvspec.models.model import Model
from lvspec.models.plan import NoPlan, one_below_the_other, plan_of

HAS_CPP = ops.active_backend("cpu") == "cpp"
as_others = pytest.mark.filterwarnings("ignore:lvspec. passes of the:RuntimeWarning")


@pytest.fixture
def known(monkeypatch):
    """Classes of this file are as those of torch or PEFT, whose state can be compared."""
    roots = {*fingerprint._KNOWN_ROOTS, __name__.partition(".")[0]}
    monkeypatch.setattr(fingerprint, "_KNOWN_ROOTS", roots)


def made(hf):
    return Model(hf, "target").made


def called(hf):
    return [type(module).__name__ for module in made(hf).plan.called]


def test_what_is_planned(target):
    """HF's tensors themselves, and the numbers of its modules."""
    text, plan = text_of(target), made(target).plan
    layer, ours = text.layers[1], plan.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    assert len(plan.layers) == 2 and plan.called == () and plan.embed is text.embed_tokens
    for product, linear in zip(
        (*ours.projections, ours.out, ours.mlp.gate, ours.mlp.up, ours.mlp.down),
        (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        + (mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        strict=True,
    ):
        assert product.weight is linear.weight and product.bias is linear.bias
    for norm, module in zip(
        (ours.input_norm, ours.post_norm, plan.norm),
        (layer.input_layernorm, layer.post_attention_layernorm, text.norm),
        strict=True,
    ):
        assert norm.weight is module.weight and norm.eps == module.variance_epsilon
    assert ours.scaling == attention.scaling and ours.q_norm is ours.k_norm is None
    assert plan.angles.frequencies.equal(text.rotary_emb.inv_freq)
    assert ours.qkv is None and ours.mlp.gate_up is None, "they do not stand together"


class Scaled(nn.Module):
    """A linear layer that is none of torch's, as quantised ones are."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = nn.Parameter(layer.weight.detach() / 4), layer.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 4, self.bias)


def activation(text):
    text.layers[1].mlp.act_fn = nn.Tanh()


def another_part_of_an_mlp(text):
    text.layers[1].mlp.extra = nn.Identity()


def linear_layers(text):
    for module in list(text.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Scaled(child))


def one_linear_layer(text):
    text.layers[0].self_attn.k_proj = Scaled(text.layers[0].self_attn.k_proj)


class Centred(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x - x.mean(-1, keepdim=True))


def norm(text):
    text.layers[0].input_layernorm = Centred(text.layers[0].input_layernorm)


def last_norm(text):
    text.norm = Centred(text.norm)


def weight_of_another_type(text):
    weight = text.layers[1].mlp.down_proj.weight
    text.layers[1].mlp.down_proj = Widened(weight)


class Widened(nn.Linear):
    def __init__(self, weight):
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight = nn.Parameter(weight.detach().double())

    def forward(self, x):
        return nn.functional.linear(x.double(), self.weight).to(x.dtype)


@as_others
@pytest.mark.parametrize(
    ("change", "names"),
    [
        (activation, ["Qwen2MLP"]),
        (another_part_of_an_mlp, ["Qwen2MLP"]),
        (one_linear_layer, ["Scaled"]),
        (linear_layers, ["Scaled"] * 14),
        (norm, ["Centred"]),
        (last_norm, ["Centred"]),
        (weight_of_another_type, ["Widened"]),
    ],
)
def test_modules_that_are_called(target, make_prompt, known, change, names):
    """As they are; all else is lvspec's, and the numbers are HF's."""
    change(text_of(target))
    assert called(target) == names
    found = made(target)
    assert found.passes == "own" and found.parts == {
        "layers": 2,
        "called": len(names),
        "compact": 0,
    }
    ran = check(target, clip(make_prompt))
    assert "rotate_and_write" in ran and "text_pass" not in ran


@as_others
@pytest.mark.parametrize("change", [activation, one_linear_layer, norm, last_norm])
def test_modules_that_are_called_as_on_a_gpu(target, make_prompt, known, as_on_a_gpu, change):
    change(text_of(target))
    check(target, clip(make_prompt))
    assert made(target).parts["called"] == 1


def extra_module(text):
    text.layers[1].extra = nn.Identity()


def extra_of_attention(text):
    text.layers[0].self_attn.gate_proj = nn.Linear(2, 2)


def no_scaling(text):
    del text.layers[0].self_attn.scaling


def extra_of_text(text):
    text.final = nn.Identity()


def head_norm(text):
    attention = text.layers[0].self_attn
    attention.q_norm = attention.k_norm = nn.LayerNorm(64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (extra_module, "Qwen2_5_VLDecoderLayer has other parts than a decoder's: extra"),
        (extra_of_attention, "Qwen2_5_VLAttention has other parts than a decoder's: gate_proj"),
        (no_scaling, "Qwen2_5_VLAttention has no scaling"),
        (extra_of_text, "Qwen2_5_VLTextModel has other parts than a decoder's: final"),
        (head_norm, "LayerNorm of heads is no RMSNorm with an ordinary weight"),
    ],
)
def test_other_decoders(target, change, reason):
    change(text_of(target))
    with pytest.raises(NoPlan, match=f"^{reason}$"):
        plan_of(text_of(target))
    with pytest.warns(RuntimeWarning) as said:
        found = made(target)
        assert made(target) is found
    (warning,) = said
    assert str(warning.message) == f"lvspec: passes of the target are HF's own, slower: {reason}"
    assert found.plan is found.cpu is None and found.passes == f"HF's: {reason}"
    assert found.parts == {"layers": 0, "called": 0, "compact": 0}


def changed(module, factor=1.01):
    """The same parts, but another computation."""
    kind = type(module)

    def forward(self, *args, **kwargs):
        result = kind.forward(self, *args, **kwargs)
        return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor

    return type(kind.__name__, (kind,), {"forward": forward})


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float64, 1.01), (torch.float32, 1.01), (torch.bfloat16, 1.1)]
)
@pytest.mark.parametrize("name", ["input_layernorm", "mlp", "self_attn", None])
def test_a_layer_that_computes_something_else(target, make_prompt, known, name, dtype, factor):
    """Its class may be one that is known: it is found by its numbers, and named."""
    layer = text_of(target.to(dtype)).layers[1]
    part = layer if name is None else getattr(layer, name)
    part.__class__ = changed(part, factor)
    reason = "layer 1 (Qwen2_5_VLDecoderLayer) computes something else than a plain decoder's"
    with pytest.warns(RuntimeWarning) as said:
        found = made(target)
    assert [str(each.message) for each in said] == [
        f"lvspec: passes of the target are HF's own, slower: {reason}"
    ]
    assert found.plan is None and found.obstacle == reason
    check(target, clip(make_prompt, dtype=dtype), 0)


@as_others
def test_a_class_of_others_is_hf_own(target):
    """What it depends on is not known, whatever it computes now."""
    one_linear_layer(text_of(target))
    assert made(target).plan is None and "Scaled" in made(target).obstacle


def test_a_rotation_that_is_replaced(target, make_prompt, monkeypatch):
    """As kernels of other libraries are put in: the function of a module of HF's."""
    modeling = __import__(type(target).__module__, fromlist=["apply_rotary_pos_emb"])
    monkeypatch.setattr(
        modeling,
        "apply_rotary_pos_emb",
        lambda q, k, cos, sin, *rest, **given: (q * cos[:, None], k + sin[:, None]),
    )
    reason = "layer 0 .Qwen2_5_VLDecoderLayer. computes something else than a plain decoder's"
    with pytest.warns(RuntimeWarning, match=reason):
        assert made(target).plan is None
    check(target, clip(make_prompt), 0)


def test_another_last_norm(target, known):
    text_of(target).norm.__class__ = changed(text_of(target).norm)
    reason = r"the last norm \(Qwen2_5_VLRMSNorm\) computes something else than a plain decoder's"
    with pytest.warns(RuntimeWarning, match=f"slower: {reason}$"):
        assert made(target).plan is None


def test_what_does_not_run_is_said_once(target, make_prompt, monkeypatch):
    """By name; HF's forward runs."""

    def fails(*given):
        raise RuntimeError("it does not compile")

    monkeypatch.setattr(ops, "rotate_and_write", fails)
    with pytest.warns(RuntimeWarning) as said:
        found = made(target)
        step(target, clip(make_prompt))
    assert [str(each.message) for each in said] == [
        "lvspec: passes of the target are HF's own, slower: RuntimeError: it does not compile"
    ]
    assert found.passes == "HF's: RuntimeError: it does not compile"


@pytest.mark.skipif(not HAS_CPP, reason="needs the C++ operations")
def test_an_operation_that_is_another_is_said(target, make_prompt, monkeypatch):
    """The whole pass in C++ is compared by itself; the many operations stay."""
    from lvspec.models.cpu_pass import CpuPass

    plain = CpuPass.run_layer

    def wrong(self, index, *given):
        result, *scores = plain(self, index, *given)
        return result * (1.01 if index == 1 else 1), *scores

    monkeypatch.setattr(CpuPass, "run_layer", wrong)
    message = r"many operations, slower: layer 1 \(Qwen2_5_VLDecoderLayer\) is another in csrc/"
    with pytest.warns(RuntimeWarning, match=message):
        assert made(target).passes == "own"
    assert "rotate_and_write" in check(target, clip(make_prompt))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_angles_that_follow_the_length_are_called(target, rope_type):
    rotary = text_of(target).rotary_emb
    rotary.rope_type, rotary.forward = rope_type, None
    plan = plan_of(text_of(target))
    assert plan.called == (rotary,) and plan.angles.dimensions is None


def test_angles_of_another_table_are_called(target, make_prompt):
    """Sections that the module does not follow."""
    rotary = text_of(target).rotary_emb
    kind = type(rotary)

    def forward(self, x, position_ids):
        return kind.forward(self, x, position_ids.flip(0))

    rotary.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    assert plan_of(text_of(target)).called == (rotary,)


def groups(text):
    for layer in text.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield attention.q_proj, attention.k_proj, attention.v_proj
        yield mlp.gate_proj, mlp.up_proj


def bytes_of(text):
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in text.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def test_weights_that_stand_together(target, tmp_path, make_prompt):
    """HF's parameters are views of them: the same objects, values and bytes, and nothing more."""
    text, before = text_of(target), copy.deepcopy(target.state_dict())
    parameters, size = [*target.named_parameters()], bytes_of(text_of(target))
    theirs = step(target, clip(make_prompt), "none")
    assert merge(plan_of(text))
    assert not merge(plan_of(text)), "once"
    for group in groups(text):
        weights = [linear.weight for linear in group]
        together = one_below_the_other(weights)
        assert together.equal(torch.cat([weight.detach() for weight in weights]))
        assert together.data_ptr() == weights[0].data_ptr()
    plan = plan_of(text)
    assert all(layer.qkv and layer.mlp.gate_up for layer in plan.layers)
    assert plan.layers[0].qkv.bias.shape == (sum(x.out_features for x in next(groups(text))),)
    gc.collect()
    assert bytes_of(text) == size
    now = [*target.named_parameters()]
    assert [(name, id(x)) for name, x in now] == [(name, id(x)) for name, x in parameters]
    assert_same(step(target, clip(make_prompt)), theirs, 2e-5)
    target.save_pretrained(tmp_path)
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    for state in (target.state_dict(), loaded.state_dict(), copy.deepcopy(target).state_dict()):
        assert state.keys() == before.keys()
        assert all(state[name].equal(x) for name, x in before.items())


def test_weights_that_are_separated(target):
    text, before = text_of(target), copy.deepcopy(target.state_dict())
    merge(plan_of(text))
    separate(plan_of(text))
    for parameter in text.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert all(x.equal(before[name]) for name, x in target.state_dict().items())
    assert all(layer.qkv is layer.mlp.gate_up is None for layer in plan_of(text).layers)


@torch.no_grad()
def test_what_was_made_is_taken_back(target, make_prompt):
    """Copies and a plan go, weights are alone again, and another call makes all of it anew."""
    model, before = Model(target, "target"), step(target, clip(make_prompt))
    merge(model.made.plan)
    assert model.made.plan.layers[0].qkv is not None, "its weights have moved: another state"
    plan = weakref.ref(model.made.plan)
    lvspec.release(target)
    gc.collect()
    assert plan() is None
    weights = [*target.model.language_model.parameters()]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in weights)
    assert_same(step(target, clip(make_prompt)), before, 2e-5)
    assert model.made.plan.layers[0].qkv is None


def test_what_is_in_use_is_not_taken_back(target):
    with Model(target, "target").held(), pytest.raises(RuntimeError, match="not being decoded"):
        lvspec.release(target)
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        lvspec.release(nn.Linear(2, 2))


@torch.no_grad()
def test_weights_that_somebody_shares_stay_where_they_are(target):
    """Such as views of a file, or of a model whose layers are the same."""
    text = text_of(target)
    linear = text.layers[0].self_attn.q_proj
    linear.weight = nn.Parameter(torch.cat([linear.weight, linear.weight])[: linear.out_features])
    address = linear.weight.data_ptr()
    assert merge(plan_of(text)), "the others"
    first, second = plan_of(text).layers
    assert linear.weight.data_ptr() == address and first.qkv is None
    assert first.mlp.gate_up is not None and second.qkv is not None


def test_one_below_the_other():
    rows = torch.arange(24.0).view(6, 4)
    parts = rows[:1], rows[1:4], rows[4:]
    assert one_below_the_other([*parts]).equal(rows)
    for others in (
        [rows[:1], rows[2:4]],  # a gap
        [rows[1:4], rows[:1]],  # the other way round
        [rows[:1], rows[1:4].clone()],
        [rows[:, :2], rows[:, 2:]],
    ):
        assert one_below_the_other(others) is None
