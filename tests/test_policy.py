"""AcceptancePolicy: presets, checks with messages that name the field, and the way through JSON."""

import dataclasses
import json
import math
import pickle

import pytest

from lvspec.policy import (
    MAX_MISMATCHES,
    PRESETS,
    AcceptancePolicy,
    largest_top_entropy,
)
from lvspec.rule import Rule, as_float32


def test_default_is_exact():
    policy = AcceptancePolicy()
    assert policy.is_exact and not policy.needs_relevance and policy.needed_top_k == 1
    assert policy.name == "custom"


def test_presets():
    strict, lvspec, fly, typical, relaxed, chance = map(AcceptancePolicy.preset, PRESETS)
    assert [p.name for p in (strict, lvspec, fly, typical, relaxed, chance)] == list(PRESETS)
    assert strict.is_exact and not any(p.is_exact for p in (lvspec, fly, typical, relaxed, chance))
    assert lvspec.anchor_threshold == "auto" and lvspec.needs_relevance and lvspec.is_calibrating
    assert (lvspec.top_k, lvspec.shift_window, lvspec.shift_regret) == (5, 2, 1.0)
    assert (lvspec.max_regret, lvspec.anchor_regret) == (1.0, 0.1)
    assert (chance.random_share, chance.random_seed) == (0.75, 0)
    assert AcceptancePolicy.random_relaxation(0.5, 7).rule.random_seed == 7
    assert (fly.min_entropy, fly.entropy_top, fly.window) == (0.3, 3, 5)
    assert (typical.typical_eps, typical.typical_delta) == (0.3, 0.09)
    assert (relaxed.top_k, relaxed.max_regret) == (10, 0.6)
    assert not any(p.needs_relevance for p in (fly, typical, relaxed, chance))
    assert [p.needed_top_k for p in (strict, lvspec, fly, typical, relaxed)] == [1, 5, 3, 1, 10]


def test_presets_take_overrides():
    policy = AcceptancePolicy.lvspec(anchor_threshold=0.2, top_k=None, eos_ids=[7, 3, 7])
    assert policy.anchor_threshold == 0.2 and policy.top_k is None and policy.eos_ids == (3, 7)
    assert policy.name == "lvspec" and policy.needed_top_k == 1
    assert AcceptancePolicy.strict(strict_ids={5}, eos_ids=(2,)).is_exact


def test_unknown_preset():
    with pytest.raises(
        ValueError, match="expected one of strict, lvspec, .*, random_relaxation"
    ):
        AcceptancePolicy.preset("lossless")
    with pytest.raises(ValueError, match="got 'preset'"):
        AcceptancePolicy.preset("preset")


def test_fields_are_normalised():
    policy = AcceptancePolicy(anchor_threshold=1, max_regret=2, strict_ids=iter([3, 1]))
    assert isinstance(policy.anchor_threshold, float) and isinstance(policy.max_regret, float)
    assert policy.strict_ids == (1, 3)
    assert hash(policy) == hash(dataclasses.replace(policy))
    assert pickle.loads(pickle.dumps(policy)) == policy


def test_replace_checks_again():
    policy = dataclasses.replace(AcceptancePolicy.fly(), eos_ids=(2,), window=1)
    assert policy.rule.window == 1 and policy.eos_ids == (2,)
    with pytest.raises(ValueError, match="window"):
        dataclasses.replace(policy, window=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.window = 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"anchor_threshold": math.nan}, "anchor_threshold: expected a number, got nan"),
        ({"max_regret": -0.5}, "max_regret: expected a number of nats >= 0 or None, got -0.5"),
        ({"max_regret": math.inf}, "max_regret: expected a finite number, or None"),
        ({"max_regret": math.nan}, "max_regret: expected a number, got nan"),
        ({"top_k": 0}, "top_k: expected an integer from 1 to 16, got 0"),
        ({"top_k": 17}, "top_k: expected an integer from 1 to 16, got 17"),
        ({"min_prob": 0.0}, r"min_prob: expected a probability in \(0, 1\] or None, got 0.0"),
        ({"min_prob": 1.5}, "min_prob: expected a probability"),
        ({"typical_eps": 0.3}, "typical_eps, typical_delta: expected both or neither"),
        ({"typical_delta": 0.3}, "typical_eps, typical_delta: expected both or neither"),
        ({"typical_eps": 2, "typical_delta": 1}, "typical_eps: expected a probability"),
        ({"typical_eps": 0.3, "typical_delta": 0}, "typical_delta: expected a number > 0"),
        ({"min_entropy": -0.1}, "min_entropy: expected a number of nats >= 0"),
        ({"min_entropy": 1.1}, "min_entropy: expected at most 1.0986.*entropy_top=3"),
        ({"min_entropy": 0.8, "entropy_top": 2}, "min_entropy: expected at most 0.7358"),
        ({"entropy_top": 0}, "entropy_top: expected an integer from 1 to 16, got 0"),
        ({"shift_window": -1}, "shift_window: expected an integer from 0 to 63, got -1"),
        ({"window": 64}, "window: expected an integer from 0 to 63, got 64"),
        ({"max_run": 0}, "max_run: expected an integer >= 1, got 0"),
        ({"regret_budget": -1}, "regret_budget: expected a number of nats >= 0"),
        ({"anchor_regret": -1}, "anchor_regret: expected a number of nats >= 0"),
        ({"shift_regret": -1}, "shift_regret: expected a number of nats >= 0"),
        ({"regret_budget": 1, "regret_rate": -1}, "regret_rate: expected a number >= 0"),
        ({"regret_rate": 0.1}, "regret_rate: expected 0 without a regret_budget"),
        ({"path_regret": -1}, "path_regret: expected a number >= 0"),
        ({"anchor_threshold": math.inf, "random_share": 1.1}, "random_share: expected a share in"),
        ({"anchor_threshold": 0.5, "random_share": 0.5}, "anchor_threshold: expected inf with a"),
        ({"random_seed": 65536}, "random_seed: expected an integer from 0 to 65535"),
        ({"strict_ids": (1, -2)}, "strict_ids: expected an integer >= 0, got -2"),
        ({"eos_ids": (-1,)}, "eos_ids: expected an integer >= 0, got -1"),
        ({"name": "strict", "shift_window": 2}, "shift_window: expected 0 in the strict preset"),
        ({"name": "strict", "max_regret": 1.0}, "max_regret: expected None in the strict preset"),
        (
            {"name": "strict", "anchor_threshold": 1},
            "anchor_threshold: expected -inf in the",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_values_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        AcceptancePolicy(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"anchor_threshold": "Auto"}, "anchor_threshold: expected a number, got 'Auto'"),
        ({"anchor_threshold": None}, "anchor_threshold: expected a number, got None"),
        ({"max_regret": "1"}, "max_regret: expected a number, got '1'"),
        ({"min_prob": True}, "min_prob: expected a number, got True"),
        ({"top_k": 2.0}, "top_k: expected an integer, got 2.0"),
        ({"window": None}, "window: expected an integer, got None"),
        ({"window": False}, "window: expected an integer, got False"),
        ({"eos_ids": 2}, "eos_ids: expected token ids, got 2"),
        ({"strict_ids": "12"}, "strict_ids: expected token ids, got '12'"),
        ({"strict_ids": (1.0,)}, "strict_ids: expected an integer, got 1.0"),
        ({"name": ""}, "name: expected a non-empty string"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_values_of_a_wrong_type(fields, message):
    with pytest.raises(TypeError, match=message):
        AcceptancePolicy(**fields)


def test_rule_of_a_policy_without_limits():
    inf = math.inf
    limits = (0, -inf, -inf, -inf, -inf, 3)
    expected = Rule(*(-inf, -inf, inf, *limits, 0, inf, 0, MAX_MISMATCHES, inf, 0, 1, 0, -1, 0))
    assert AcceptancePolicy().rule == expected


def test_rule_numbers_are_float32_logarithms():
    rule = AcceptancePolicy(
        anchor_threshold=0.1, min_prob=0.1, typical_eps=0.3, typical_delta=0.09, max_run=500
    ).rule
    assert rule.anchor_threshold == 13421773 / 2**27 != 0.1
    assert rule.min_log_prob == as_float32(math.log(0.1))
    assert rule.typical_log_eps == as_float32(math.log(0.3))
    assert rule.typical_log_delta == as_float32(math.log(0.09))
    assert rule.max_run == MAX_MISMATCHES


def test_as_float32():
    assert as_float32(0.5) == 0.5 and as_float32(-math.inf) == -math.inf
    assert as_float32(1e300) == math.inf and as_float32(-1e300) == -math.inf


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_largest_top_entropy(count):
    """Reached by equal probabilities, at 1/e each where that leaves room, and passed by none."""
    most = largest_top_entropy(count)
    reached = []
    for step in range(1, 2001):
        p = step / 2000 / count
        reached.append(-count * p * math.log(p))
    assert max(reached) == pytest.approx(most, abs=1e-5) and max(reached) <= most + 1e-12


@pytest.mark.parametrize("name", PRESETS)
def test_through_json(name):
    policy = AcceptancePolicy.preset(name, eos_ids=(2, 3))
    text = json.dumps(policy.to_dict(), allow_nan=False)
    assert AcceptancePolicy.from_dict(json.loads(text)) == policy


def test_unknown_field():
    with pytest.raises(ValueError, match="expected keys among anchor_threshold, .*, got topk"):
        AcceptancePolicy.from_dict({"topk": 3})
    assert AcceptancePolicy.from_dict({}) == AcceptancePolicy()
