"""A policy of its own for every request, and the gate that finds its threshold, in the loop."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from policies import gated

from lvspec import AcceptancePolicy, DecodeConfig, Decoder, generate, generate_many, reference
from lvspec.rule import GATE_BINS, Rule

FOUND = gated("auto", top_k=8, shift_window=3)
STRICT = AcceptancePolicy.strict()
POLICIES = [
    STRICT,
    gated(0.12, strict_ids=(3, 5, 7)),
    AcceptancePolicy.relaxed(top_k=16, max_regret=1.0),
    FOUND,
    AcceptancePolicy.random_relaxation(0.5, 3),
    gated(math.inf, regret_budget=0.2, regret_rate=0.05),
]


def two_kinds(output):
    """Relevance of two kinds of rows, which a random target has not: by the target's choice."""
    looks = output.logits.argmax(-1) % 3 == 0
    return torch.where(looks, 0.3, 0.02) * (1 + output.peaks.mean((0, 2)))


OPTIONS = {"gamma": 6, "max_new_tokens": 40, "eos_ids": (), "scorer": two_kinds}
CONFIG = DecodeConfig(**OPTIONS)


@pytest.fixture(scope="module")
def prompts(make_prompt):
    return [make_prompt(3, ("video", 4, 6, 6), 5, seed=seed) for seed in range(len(POLICIES))]


@pytest.fixture(scope="module")
def alone(random_pair, noisy_draft, prompts):
    """What each prompt gives with its policy."""
    target = random_pair[0]
    return [
        generate(target, noisy_draft, prompt, policy=policy, config=CONFIG)
        for prompt, policy in zip(prompts, POLICIES)
    ]


def assert_same(found, expected):
    assert found.tokens.equal(expected.tokens) and found.kinds.equal(expected.kinds)
    assert found.anchors.equal(expected.anchors)
    assert found.stats.regret == pytest.approx(expected.stats.regret, abs=1e-5)
    assert found.stats.gate == expected.stats.gate


def test_they_differ(alone):
    loose = [each.stats.counts["loose"] > 0 for each in alone]
    assert loose == [False, True, True, True, True, True]
    assert [each.stats.gate for each in alone] == ["none", "on", "none", "on", "none", "none"]


def test_a_list_of_policies(random_pair, noisy_draft, prompts, alone):
    found = generate(random_pair[0], noisy_draft, prompts, policy=POLICIES, config=CONFIG)
    for each, expected in zip(found, alone, strict=True):
        assert_same(each, expected)


@pytest.mark.parametrize("lag", [0, 2])
def test_policies_come_as_places_are_free(random_pair, noisy_draft, prompts, alone, lag):
    """Each needs more than those before: scores, ranks, guarded ids."""
    config = DecodeConfig(**OPTIONS, lag=lag)
    requests = [(prompt, None, policy) for prompt, policy in zip(prompts, POLICIES)]
    options = {"policy": STRICT, "config": config, "batch_size": 2}
    found = list(generate_many(random_pair[0], noisy_draft, requests, **options))
    for each, expected in zip(found, alone, strict=True):
        assert_same(each, expected)


def test_a_decoders_policy_may_change(random_pair, noisy_draft, prompts, alone):
    decoder = Decoder(random_pair[0], noisy_draft, STRICT, CONFIG)
    for index in (0, 3, 0, 1, 4):
        assert_same(decoder.generate(prompts[index], policy=POLICIES[index]), alone[index])
    assert_same(decoder.generate(prompts[0]), alone[0])


def test_what_is_no_policy(random_pair, noisy_draft, prompts):
    decoder = Decoder(random_pair[0], noisy_draft, STRICT, CONFIG)
    with pytest.raises(ValueError, match="policy: expected 2 entries, one a prompt, got 1"):
        decoder.generate(prompts[:2], policy=[STRICT])
    with pytest.raises(TypeError, match="policy: expected .*AcceptancePolicy"):
        decoder.generate(prompts[:1], policy=["strict"])
    run = partial(generate_many, random_pair[0], noisy_draft, config=CONFIG)
    with pytest.raises(TypeError, match="policy: expected .*AcceptancePolicy"):
        list(run([(prompts[0], None, "strict")]))
    with pytest.raises(ValueError, match=r"inputs: expected a prompt, .*got a tuple of 4"):
        list(run([(prompts[0], None, STRICT, 1)]))


def test_the_threshold_is_found_in_the_rows_of_the_sequence(random_pair, noisy_draft, prompts):
    """As the reference finds it, pass by pass, in what the trace has of relevance."""
    config = DecodeConfig(**OPTIONS, trace=True)
    found = generate(random_pair[0], noisy_draft, prompts[3], policy=FOUND, config=config)
    seen = torch.zeros(1, GATE_BINS, dtype=torch.int32)
    rule, thresholds, anchors = torch.tensor([FOUND.rule]), [], [False]
    for step in found.trace.steps():
        relevance = torch.tensor([step.relevance])
        slots = torch.tensor([relevance.shape[1]], dtype=torch.int32)
        adjusted, seen = reference.gate(relevance, slots, rule, seen)
        thresholds.append(float(Rule(*adjusted[0]).anchor_threshold))
        assert step.anchor_threshold == thresholds[-1]
        rows = [0, *step.path]
        anchors += [step.relevance[row] >= thresholds[-1] for row in rows]
    assert found.anchors[0].tolist() == anchors[: found.tokens.shape[1]]
    assert thresholds[0] == -math.inf, "seven rows are too few"
    assert len(set(thresholds)) > 1 and found.stats.threshold == thresholds[-1] > 0
    assert found.stats.num_strict == thresholds.count(-math.inf) < len(thresholds)
    assert found.to_dict()["stats"]["anchor_threshold"] == thresholds[-1]


def test_strict_and_said_where_rows_are_all_alike(random_pair, noisy_draft, prompts):
    target = copy.deepcopy(random_pair[0])
    strict = generate(target, noisy_draft, prompts[3], policy=STRICT, config=CONFIG)

    def alike(output):
        return torch.full(output.logits.shape[:2], 0.3)

    config = DecodeConfig(**{**OPTIONS, "scorer": alike})
    with pytest.warns(RuntimeWarning, match="no two kinds of rows were found .* in 39 tokens"):
        found = generate(target, noisy_draft, prompts[3], policy=FOUND, config=config)
    assert found.tokens.equal(strict.tokens) and found.stats.gate == "not found"
    assert found.stats.num_strict == found.stats.num_iterations
    assert found.to_dict()["stats"]["anchor_threshold"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(target, noisy_draft, prompts[3], policy=FOUND, config=config)


def test_chance(random_pair, noisy_draft, prompts):
    """No row, all rows, and a share of them that does not depend on the batch."""
    target = random_pair[0]

    def run(share, seed=0, prompts=prompts):
        policy = AcceptancePolicy.random_relaxation(share, seed)
        return generate(target, noisy_draft, prompts, policy=policy, config=CONFIG)

    strict = generate(target, noisy_draft, prompts, policy=STRICT, config=CONFIG)
    anything = AcceptancePolicy(anchor_threshold=math.inf)
    free = generate(target, noisy_draft, prompts, policy=anything, config=CONFIG)
    assert all(a.tokens.equal(b.tokens) for a, b in zip(run(0.0), strict))
    assert all(a.tokens.equal(b.tokens) for a, b in zip(run(1.0), free))
    half = run(0.5)
    assert all(a.tokens.equal(b.tokens) for a, b in zip(half, run(0.5)))
    assert half[1].tokens.equal(run(0.5, prompts=prompts[1]).tokens)
    assert not all(a.tokens.equal(b.tokens) for a, b in zip(half, run(0.5, seed=1)))
    taus = [sum(each.stats.tau for each in runs) for runs in (strict, half, free)]
    assert taus == sorted(taus) and len(set(taus)) == 3


def test_a_budget_that_grows(random_pair, noisy_draft, prompts):
    """What is spent never exceeds what was earned by then."""
    policy = gated(math.inf, top_k=None, regret_budget=0.2, regret_rate=0.05)
    config = DecodeConfig(**OPTIONS, trace=True)
    fixed = gated(math.inf, top_k=None, regret_budget=0.2)
    spent = {}
    for name, each in (("grows", policy), ("fixed", fixed)):
        found = generate(random_pair[0], noisy_draft, prompts[0], policy=each, config=config)
        spent[name] = found.stats.regret
    assert spent["fixed"] <= 0.2 < spent["grows"] <= 0.2 + 0.05 * 40
