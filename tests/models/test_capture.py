"""Recorded passes: the same numbers as HF's Python, and never a stale one."""

import copy
import gc
import weakref
from types import MethodType

import pytest
import torch
import torch.nn.functional as F

from lvspec import AcceptancePolicy, DecodeConfig, generate, ops
from lvspec.models import recorder as capture
from lvspec.models.attention import lvspec_attention_on
from lvspec.models.fused import fused, recognise
from lvspec.models.fused.cpu import CpuOperations
from lvspec.models.inputs import check_inputs
from lvspec.models.model import Model
from lvspec.tree import ancestors_from_parents, chain_ancestors

TREE = torch.tensor([-1, 0, 0, 1, 1, 2])
needs_cpp = pytest.mark.skipif(not ops.backends()["cpp"], reason="needs the C++ operations")


@pytest.fixture
def target(random_pair):
    """A model of this test's own, so that nothing is recorded yet."""
    return copy.deepcopy(random_pair[0])


def step(hf, prompt, *, capture, batch_size=1, scores=True, capacity=70, tokens=None):
    """One pass over a tree behind the prompt, and the cache it leaves."""
    model = Model(hf, "target", record=capture)
    cache = model.new_cache(batch_size=batch_size, capacity=capacity, num_slots=len(TREE))
    depths = torch.tensor([0, 1, 1, 2, 2, 2])
    ancestors = ancestors_from_parents(TREE.repeat(batch_size, 1))
    if tokens is None:
        tokens = torch.arange(8, 8 + len(TREE)).repeat(batch_size, 1)
    with torch.inference_mode(), lvspec_attention_on(model.text):
        for sequence in range(batch_size):
            model.prefill(check_inputs(model, prompt), cache, sequence)
        return model.step(tokens, depths, ancestors, cache, scores=scores), cache


def close(ours, theirs):
    """Equal but for the order in which a product of a few rows is summed."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def recordings(hf):
    found = capture._RECORDINGS.get(hf.model.language_model)
    return {} if found is None else found["kernels"].passes


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_same_numbers_in_any_cache(target, make_prompt, batch_size, scores):
    """Recorded once; then other prompts, other tokens, caches of other capacities."""
    for seed, capacity in ((0, 70), (1, 41), (2, 99)):
        prompt = make_prompt(5, ("video", 2, 6, 4), 3, seed=seed)
        tokens = torch.randint(8, 186, (batch_size, len(TREE)))
        given = {"batch_size": batch_size, "scores": scores, "capacity": capacity}
        given["tokens"] = tokens
        eager, eager_cache = step(target, prompt, capture=False, **given)
        replayed, cache = step(target, prompt, capture=True, **given)
        close(replayed.logits, eager.logits)
        close(cache.k, eager_cache.k)
        close(cache.v, eager_cache.v)
        for ours, theirs in ((replayed.masses, eager.masses), (replayed.peaks, eager.peaks)):
            assert (ours is None and theirs is None) or close(ours, theirs) is None
        if scores:
            assert (replayed.peaks > 0).any()
    (recorded,) = recordings(target).values()
    assert recorded is not None


def test_weights_that_change_in_place_are_used(target, make_prompt):
    prompt = make_prompt(5)
    before, _ = step(target, prompt, capture=True)
    with torch.no_grad():
        target.model.language_model.layers[0].mlp.down_proj.weight.mul_(2)
    after, _ = step(target, prompt, capture=True)
    expected, _ = step(target, prompt, capture=False)
    close(after.logits, expected.logits)
    assert (after.logits - before.logits).abs().max() > 0.01


def test_weights_that_are_replaced_are_used(target, make_prompt):
    prompt = make_prompt(5)
    step(target, prompt, capture=True)
    layer = target.model.language_model.layers[0].mlp
    layer.down_proj.weight = torch.nn.Parameter(layer.down_proj.weight * 2)
    after, _ = step(target, prompt, capture=True)
    expected, _ = step(target, prompt, capture=False)
    close(after.logits, expected.logits)
    converted, _ = step(target.double(), prompt, capture=True)
    assert converted.logits.dtype == torch.float64


def test_modules_with_hooks_are_not_recorded(target, make_prompt):
    calls = []
    layer = target.model.language_model.layers[1]
    hook = layer.register_forward_hook(lambda *given: calls.append(1))
    for _ in range(3):
        step(target, make_prompt(5), capture=True)
    hook.remove()
    assert len(calls) == 6 and not recordings(target)  # a prefill and a pass each


def test_dynamic_rotary_embeddings_are_not_recorded(target, make_prompt):
    target.model.language_model.config.rope_parameters["rope_type"] = "dynamic"
    assert Model(target, "target").recorder is None


def test_a_head_that_is_replaced_is_used(target, make_prompt):
    prompt = make_prompt(5)
    step(target, prompt, capture=True)
    target.lm_head = torch.nn.Linear(256, 256, bias=False)
    after, _ = step(target, prompt, capture=True)
    expected, _ = step(target, prompt, capture=False)
    close(after.logits, expected.logits)


def test_what_cannot_be_recorded_runs_with_a_warning(target, make_prompt, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no tracing today")

    prompt = make_prompt(5)
    expected, _ = step(target, prompt, capture=False)
    monkeypatch.setattr(torch.jit, "trace", fail)
    with pytest.warns(RuntimeWarning, match="no tracing today"):
        got, _ = step(target, prompt, capture=True)
    close(got.logits, expected.logits)


def test_recordings_go_with_the_model(random_pair, make_prompt):
    model = copy.deepcopy(random_pair[0])
    step(model, make_prompt(5), capture=True)
    assert recordings(model)
    text = weakref.ref(model.model.language_model)
    del model
    gc.collect()
    assert text() is None


@pytest.mark.parametrize("policy", [AcceptancePolicy.strict(), AcceptancePolicy.lvspec()])
def test_generate_is_the_same(random_pair, noisy_draft, make_prompt, policy):
    prompt = make_prompt(5, ("video", 2, 6, 4), 3)
    results = [
        generate(
            random_pair[0],
            noisy_draft,
            prompt,
            policy=policy,
            config=DecodeConfig(gamma=4, max_new_tokens=24, eos_ids=(), capture=flag),
        )
        for flag in (False, True)
    ]
    assert torch.equal(results[0].tokens, results[1].tokens)
    relevance = [result.relevance for result in results]
    torch.testing.assert_close(*relevance, rtol=0, atol=2e-5, equal_nan=True)


def test_without_cpp_the_bits_are_the_same(target, make_prompt, monkeypatch):
    monkeypatch.setattr("lvspec.models.fused.active_backend", lambda device_type: "reference")
    prompt = make_prompt(5, ("video", 2, 6, 4), 3)
    expected, _ = step(target, prompt, capture=False)
    got, _ = step(target, prompt, capture=True)
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.peaks, expected.peaks)


@needs_cpp
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 1, 1), (2, 7, 5), (13, 256, 27), (16, 300, 12), (64, 5, 40)]
)
def test_products_of_a_few_rows(rows, inputs, outputs):
    x, weight, bias = (
        torch.randn(1, rows, inputs),
        torch.randn(outputs, inputs),
        torch.randn(outputs),
    )
    for given in (bias, None):
        got = torch.ops.lvspec.cpu_linear(x, weight, given)
        exact = F.linear(x.double(), weight.double(), None if given is None else given.double())
        theirs = (F.linear(x, weight, given) - exact).abs().max().item()
        rounding = torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert (got - exact).abs().max().item() <= 2 * max(theirs, rounding)
        alone = torch.ops.lvspec.cpu_linear(x[:, -1:], weight, given)
        assert torch.equal(got[:, -1:], alone), "a row's bits do not depend on the others"


@needs_cpp
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 7, 8, 12, 13, 16, 17])
def test_any_number_of_rows(target, make_prompt, slots, batch_size):
    tokens = torch.randint(8, 186, (batch_size, slots))
    results = []
    for flag in (False, True):
        model = Model(target, "target", record=flag)
        cache = model.new_cache(batch_size=batch_size, capacity=60, num_slots=slots)
        ancestors = chain_ancestors(slots, batch_size=batch_size, device=model.device)
        with torch.inference_mode(), lvspec_attention_on(model.text):
            for sequence in range(batch_size):
                prompt = make_prompt(5 + sequence, ("video", 2, 6, 4), 3, seed=sequence)
                model.prefill(check_inputs(model, prompt), cache, sequence)
            output = model.step(tokens, torch.arange(slots), ancestors, cache, scores=True)
        results.append((output.logits, output.masses, output.peaks, cache.k, cache.v))
    for eager, replayed in zip(*results, strict=True):
        close(replayed, eager)


FUSED = {"cpu_rms_norm", "cpu_gated_linear", "cpu_rotate_and_write", "cpu_rotary_angles"}


def fused_operations(hf):
    (recorded,) = recordings(hf).values()
    kinds = {node.kind() for node in recorded.inlined_graph.nodes()}
    return {name for name in FUSED if f"lvspec::{name}" in kinds}


@needs_cpp
def test_parts_are_fused(target, make_prompt):
    step(target, make_prompt(5), capture=True)
    assert fused_operations(target) == FUSED


def change_norm(text):
    change(text.layers[1].input_layernorm)
    change(text.layers[0].post_attention_layernorm)


def change(module):
    """The same parts, but another computation."""
    code = type(module).forward

    class Changed(type(module)):
        def forward(self, *args, **kwargs):
            return code(self, *args, **kwargs) * 1.01

    Changed.__name__ = type(module).__name__
    module.__class__ = Changed


def change_rotary(text):
    kind = type(text.rotary_emb)

    class Changed(kind):
        def forward(self, x, position_ids):
            return kind.forward(self, x, position_ids.flip(0))

    text.rotary_emb.__class__ = Changed


def patch_mlps(text):
    """As libraries do that move weights between devices."""
    for layer in text.layers:
        code = type(layer.mlp).forward
        layer.mlp.forward = MethodType(lambda self, x, code=code: code(self, x) * 1.01, layer.mlp)


@pytest.mark.filterwarnings("ignore:lvspec. passes of the:RuntimeWarning")
@pytest.mark.parametrize(
    "modify",
    [
        change_norm,
        lambda text: [change(layer.mlp) for layer in text.layers],
        patch_mlps,
        change_rotary,
    ],
)
def test_with_code_of_others_nothing_is_recorded(target, make_prompt, modify):
    """What it depends on is not known."""
    prompt = make_prompt(5, ("video", 2, 6, 4), 3)
    plain, _ = step(target, prompt, capture=False)
    modify(target.model.language_model)
    expected, _ = step(target, prompt, capture=False)
    got, _ = step(target, prompt, capture=True)
    assert torch.equal(got.logits, expected.logits)
    assert (expected.logits - plain.logits).abs().max() > 1e-3
    assert not recordings(target)


@needs_cpp
@pytest.mark.parametrize(
    ("modify", "left"),
    [
        (lambda text: setattr(text.layers[1].mlp, "act_fn", torch.nn.Tanh()), set()),
        (
            lambda text: [setattr(layer.mlp, "act_fn", torch.nn.Tanh()) for layer in text.layers],
            {"cpu_gated_linear"},
        ),
    ],
)
def test_parts_that_compute_something_else_are_left_alone(target, make_prompt, modify, left):
    prompt = make_prompt(5, ("video", 2, 6, 4), 3)
    plain, _ = step(target, prompt, capture=False)
    modify(target.model.language_model)
    expected, _ = step(target, prompt, capture=False)
    got, _ = step(target, prompt, capture=True)
    close(got.logits, expected.logits)
    assert (expected.logits - plain.logits).abs().max() > 1e-3
    assert fused_operations(target) == FUSED - left


@needs_cpp
def test_a_changed_rotation_is_left_alone(target, make_prompt, monkeypatch):
    modeling = __import__(type(target).__module__, fromlist=["apply_rotary_pos_emb"])
    monkeypatch.setattr(
        modeling,
        "apply_rotary_pos_emb",
        lambda q, k, cos, sin: (q * cos[:, None], k + sin[:, None]),
    )
    prompt = make_prompt(5)
    expected, _ = step(target, prompt, capture=False)
    got, _ = step(target, prompt, capture=True)
    close(got.logits, expected.logits)
    assert fused_operations(target) == FUSED - {"cpu_rotate_and_write"}


@needs_cpp
def test_other_types_are_not_fused(target, make_prompt):
    target.double()
    prompt = make_prompt(5)
    expected, _ = step(target, prompt, capture=False)
    got, _ = step(target, prompt, capture=True)
    assert torch.equal(got.logits, expected.logits)
    assert not fused_operations(target)


@needs_cpp
def test_patches_are_gone_afterwards(target, make_prompt):
    modules = list(target.model.language_model.modules())

    def patched():
        return sum("forward" in vars(module) for module in modules)

    patches = recognise(modules, CpuOperations())
    assert patched() == 0
    with fused(patches):
        assert patched() > 3
    assert patched() == 0
    with pytest.raises(KeyError), fused(patches):
        raise KeyError
    assert patched() == 0
    theirs = modules[-1].forward = lambda *arguments: None
    with fused(patches):
        assert modules[-1].forward is theirs
    assert modules[-1].forward is theirs


@needs_cpp
def test_rotation_into_a_cache():
    """Rows behind kv_len of one layer and nothing else; a cache that is full is an error."""
    q, k, v = torch.randn(2, 3, 4 * 8), torch.randn(2, 3, 2 * 8), torch.randn(2, 3, 2 * 8)
    angles = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    caches = torch.randn(2, 3, 2, 2, 9, 8).unbind(0)
    expected = [cache.clone() for cache in caches]

    def turned(x):
        x = x.view(2, 3, -1, 8).transpose(1, 2)
        cos, sin = (angle[:, None] for angle in angles)
        return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin

    for sequence, start in enumerate((6, 0)):
        rows = slice(start, start + 3)
        expected[0][1, sequence, :, rows] = turned(k)[sequence]
        expected[1][1, sequence, :, rows] = v.view(2, 3, 2, 8).transpose(1, 2)[sequence]
    run = torch.ops.lvspec.cpu_rotate_and_write
    got = run(q, k, v, *angles, *caches, 1, torch.tensor([6, 0], dtype=torch.int32))
    close(got, turned(q))
    close(list(caches), expected)
    for kv_len in (-1, 7):
        with pytest.raises(RuntimeError, match="room for the slots"):
            run(q, k, v, *angles, *caches, 1, torch.tensor([0, kv_len], dtype=torch.int32))
    close(list(caches), expected)


@needs_cpp
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(2, 7, 5), (13, 256, 27), (16, 300, 12)])
def test_gated_products(rows, inputs, outputs):
    x, gate, up = torch.randn(1, rows, inputs), *torch.randn(2, outputs, inputs)
    exact = F.silu(F.linear(x.double(), gate.double())) * F.linear(x.double(), up.double())
    products = F.linear(x, gate), F.linear(x, up)
    bound = 4 * (F.silu(products[0]) * products[1] - exact).abs().max() + 1e-6 * exact.abs().max()
    got = torch.ops.lvspec.cpu_gated_linear(x, gate, up)
    assert (got - exact).abs().max() <= bound
    assert (torch.ops.lvspec.cpu_silu_multiply(*products) - exact).abs().max() <= bound
    alone = torch.ops.lvspec.cpu_gated_linear(x[:, :1], gate, up)
    assert torch.equal(got[:, :1], alone), "a row's bits do not depend on the others"
