"""Recorded passes: the same numbers as HF's Python, and never a stale one."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from lvspec import AcceptancePolicy, DecodeConfig, capture, generate, ops
from lvspec.attention import lvspec_attention_on
from lvspec.models import Model, check_inputs
from lvspec.tree import ancestors_from_parents

TREE = torch.tensor([-1, 0, 0, 1, 1, 2])


@pytest.fixture
def target(random_pair):
    """A model of this test's own, so that nothing is recorded yet."""
    return copy.deepcopy(random_pair[0])


def step(hf, prompt, *, capture, batch_size=1, scores=True, capacity=70, tokens=None):
    """One pass over a tree behind the prompt, and the cache it leaves."""
    model = Model(hf, "target", capture=capture)
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
    return {} if found is None else found.passes


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
    assert torch.equal(got.logits, expected.logits)


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
    monkeypatch.setattr(capture, "active_backend", lambda device_type: "reference")
    prompt = make_prompt(5, ("video", 2, 6, 4), 3)
    expected, _ = step(target, prompt, capture=False)
    got, _ = step(target, prompt, capture=True)
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.peaks, expected.peaks)


@pytest.mark.skipif(not ops.backends()["cpp"], reason="needs the C++ operations")
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
