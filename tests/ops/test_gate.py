"""gate: literals worked out by hand, and random calls equal to the reference bit for bit."""

import math
import random

import pytest
import torch

from lvspec import ops, reference
from lvspec.policy import AcceptancePolicy
from lvspec.rule import GATE_BINS, GATE_ROWS, Rule, strict_rule

POLICY = AcceptancePolicy.lvspec(anchor_regret=0.25, shift_window=2)
NAN, INF = math.nan, math.inf


def rule_of(policy=POLICY, **numbers):
    return policy.rule._replace(**numbers)


def call(relevance, *, rows=None, rules=None, seen=None, operation=ops.gate):
    """`relevance` per sequence; the rules wait for one row unless they say otherwise."""
    batch_size = len(relevance)
    if rules is None:
        rules = [rule_of(gate_rows=1.0)] * batch_size
    rows = [len(of_one) for of_one in relevance] if rows is None else rows
    if seen is None:
        seen = torch.zeros(batch_size, GATE_BINS, dtype=torch.int32)
    return operation(
        torch.tensor(relevance),
        torch.tensor(rows, dtype=torch.int32),
        torch.tensor(rules, dtype=torch.float32),
        seen,
    )


def counts(seen):
    """{bin: rows} of one sequence."""
    return {index: count for index, count in enumerate(seen.tolist()) if count}


def numbers(rule):
    return Rule(*rule.tolist())


@pytest.mark.parametrize(
    ("relevance", "seen", "threshold"),
    [
        # The example of the specification: the lower end of bin 41.
        ([1 / 64] * 6 + [1 / 4] * 2, {40: 6, 56: 2}, 5 / 256),
        # Bins 40, 44 and 60: cuts from 40 have 96^2 / 8 between, those from 44 96^2 / 5.
        ([1 / 64] * 4 + [1 / 32] + [1 / 2], {40: 4, 44: 1, 60: 1}, 5 / 128),
        # One octave apart is enough, a quarter of an octave less is not: bins 40 and 44, 41 and 44.
        ([1 / 64, 1 / 32], {40: 1, 44: 1}, 5 / 256),
        ([5 / 256, 1 / 32], {41: 1, 44: 1}, None),
        # Means decide: bins 40, 41 (twice each) and 44, 45 are 4 apart, 40, 42 and 44, 45 are not.
        ([1 / 64, 5 / 256] * 2 + [1 / 32, 5 / 128] * 2, {40: 2, 41: 2, 44: 2, 45: 2}, 6 / 256),
        ([1 / 64, 6 / 256] * 2 + [1 / 32, 5 / 128] * 2, {40: 2, 42: 2, 44: 2, 45: 2}, None),
        # One cluster: a single bin has no cut.
        ([1 / 64] * 8, {40: 8}, None),
        # What counts as what: all that is not above 0 is in bin 0, NaN in none, 1 and more in 63.
        ([0.0, -0.0, -3.5, -INF, 1e-30, NAN, 1.0, 7.0, INF], {0: 5, 63: 3}, 2.0**-16 * 1.25),
        ([2.0**-16, 1.2499 * 2.0**-16, 1.25 * 2.0**-16], {0: 2, 1: 1}, None),
        ([NAN, NAN], {}, None),
        # The last cut: everything else below bin 63, whose lower end is 7/8.
        ([13 / 16] * 2 + [0.25], {56: 1, 62: 2}, 5 / 16),
    ],
)
def test_literals(relevance, seen, threshold):
    got = call([relevance])
    assert counts(got.seen[0]) == seen
    given = rule_of(gate_rows=1.0)
    if threshold is None:
        assert numbers(got.rule[0]) == strict_rule(given)
        assert numbers(got.rule[0]).gate_rows == 1.0
    else:
        assert numbers(got.rule[0]) == given._replace(anchor_threshold=threshold)


def test_it_waits_for_its_rows_and_remembers():
    """Two calls of six rows each: the twelfth makes the gate; a NaN is no row."""
    seen = torch.zeros(1, GATE_BINS, dtype=torch.int32)
    relevance = [1 / 64] * 4 + [1 / 4] * 2
    rules = [POLICY.rule]
    assert POLICY.rule.gate_rows == GATE_ROWS == 12
    first = call([relevance], rules=rules, seen=seen)
    assert numbers(first.rule[0]) == strict_rule(POLICY.rule)
    assert not seen.any()  # arguments are left alone
    almost = call([relevance[:-1] + [NAN]], rules=rules, seen=first.seen)
    assert numbers(almost.rule[0]) == strict_rule(POLICY.rule)
    assert counts(almost.seen[0]) == {40: 8, 56: 3}
    # What a rule says of its threshold does not matter, only what was given does.
    second = call([relevance], rules=rules, seen=first.seen)
    assert counts(second.seen[0]) == {40: 8, 56: 4}
    assert numbers(second.rule[0]) == POLICY.rule._replace(anchor_threshold=5 / 256)


@pytest.mark.parametrize(("rows", "counted"), [(3, 3), (8, 8), (99, 8), (0, 1), (-5, 1)])
def test_only_slots_in_use_are_rows(rows, counted):
    relevance = [1 / 64] * 8
    got = call([relevance], rows=[rows])
    assert counts(got.seen[0]) == {40: counted}


def test_sequences_are_independent_and_others_untouched():
    rng = random.Random(1)
    relevance = [[rng.random() ** 4 for _ in range(9)] for _ in range(6)]
    rules = [rule_of(gate_rows=float(rows)) for rows in (1, 0, 9, 10, 0, 1)]
    rules[4] = AcceptancePolicy.fly().rule
    seen = torch.randint(0, 3, (6, GATE_BINS), dtype=torch.int32)
    together = call(relevance, rules=rules, seen=seen)
    for i in (1, 4):
        assert numbers(together.rule[i]) == rules[i]
        assert torch.equal(together.seen[i], seen[i])
    for i in range(6):
        alone = call(relevance[i : i + 1], rules=rules[i : i + 1], seen=seen[i : i + 1])
        assert torch.equal(alone.rule[0], together.rule[i])
        assert torch.equal(alone.seen[0], together.seen[i])


def test_no_sequence():
    empty = ops.gate(
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int32),
        torch.zeros(0, len(Rule._fields)),
        torch.zeros(0, GATE_BINS, dtype=torch.int32),
    )
    assert empty.rule.shape == (0, len(Rule._fields)) and empty.seen.shape == (0, GATE_BINS)


def scattered(tensor):
    """The same values with other strides."""
    wide = torch.full([2 * size + 1 for size in tensor.shape[::-1]], 77, dtype=tensor.dtype)
    view = wide.permute(*range(tensor.dim())[::-1])[(slice(1, None, 2),) * tensor.dim()]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("slots", [1, 31, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_reference(slots, dtype):
    """Two kinds of rows, near each other or far, of every size; some odd numbers among them."""
    batch_size = 24
    kinds = torch.randint(0, 2, (batch_size, slots))
    means = -1 - 13 * torch.rand(batch_size, 2)
    means[::2, 1] = means[::2, 0] + 1  # about an octave
    relevance = (means.gather(1, kinds) + 0.4 * torch.randn(batch_size, slots)).exp2().to(dtype)
    odd = torch.tensor([NAN, 0.0, -1.0, 1.0, 2.0, INF, 1e-40], dtype=dtype)
    is_odd = torch.rand(batch_size, slots) < 0.05
    relevance[is_odd] = odd[torch.randint(0, len(odd), (int(is_odd.sum()),))]
    rows = torch.randint(-1, slots + 3, (batch_size,), dtype=torch.int32)
    rules = torch.tensor([POLICY.rule] * batch_size)
    rules[:, Rule._fields.index("gate_rows")] = torch.randint(0, 30, (batch_size,)).float()
    seen = torch.randint(0, 60, (batch_size, GATE_BINS), dtype=torch.int32)
    seen[torch.rand(batch_size, GATE_BINS) < 0.8] = 0
    seen[:8] = 0
    given = (relevance, rows, rules, seen)
    expected = reference.gate(*given)
    for arguments in (given, tuple(map(scattered, given))):
        got = ops.gate(*arguments)
        assert torch.equal(got.rule, expected.rule)
        assert torch.equal(got.seen, expected.seen)
    threshold = expected.rule[:, 0]
    assert (threshold > 0).any() and (threshold == -INF).any()


def test_a_million_rows():
    """Products of counts are past 32 bits, and squares of them past 64.

    2.9 million below, 0.7 above bin 20: 14.7 and 50 in the mean, further than any other two.
    """
    seen = torch.zeros(1, GATE_BINS, dtype=torch.int32)
    for index, count in ((3, 900_000), (5, 1), (20, 2_000_000), (50, 700_000), (61, 3)):
        seen[0, index] = count
    got = call([[1 / 64]], seen=seen)
    assert torch.equal(got.rule, call([[1 / 64]], seen=seen, operation=reference.gate).rule)
    assert numbers(got.rule[0]).anchor_threshold == 5 / 2**13
