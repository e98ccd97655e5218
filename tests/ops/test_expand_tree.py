"""expand_tree against sorting every child of every node."""

import math

import pytest
import torch

from lvspec import ops
from lvspec.kernels.workspace import expand_tree_bytes

KERNEL = ops.active_backend("cpu") == "triton"  # in its interpreter: fewer sequences
DTYPES = ops.float_dtypes("cpu")
EXACT = torch.float64 if torch.float64 in DTYPES else torch.float32
MANY = (65, 1, 5) if KERNEL else (67, 2, 5)
EPS = torch.finfo(torch.float32).eps


def children(logits, log_probs, slots, width, top_k):
    """(log-probability, node, token, slot) of the best children of one sequence, best first."""
    found = []
    for node, row in enumerate(logits):
        total = row.logsumexp(0).item()
        values = [-math.inf if math.isnan(x) else x for x in row.tolist()]
        ranking = sorted(range(len(values)), key=lambda token: (-values[token], token))
        for token in ranking[:top_k]:
            log_prob = log_probs[node].item() + (values[token] - total)
            log_prob = -math.inf if math.isnan(log_prob) else log_prob
            found.append((-log_prob, node, token, slots[node].item()))
    return sorted(found)[:width]


def arguments(shape, dtype=torch.float32):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slots = torch.randint(0, 64, shape[:2], dtype=torch.int32)
    return torch.randn(shape).to(dtype), -torch.rand(shape[:2], dtype=wide), slots


def by_sorting(logits, log_probs, slots, width, top_k):
    """Tokens, parents and log-probabilities from what logit_stats returns, in the same type."""
    top_ids, top_logits, lse, _ = ops.logit_stats(logits, top_k=top_k)
    values = log_probs[:, :, None] + (top_logits - lse[:, :, None])
    values = torch.where(values.isnan(), -math.inf, values)
    tokens, parents, best = [], [], []
    for b in range(len(logits)):
        found = [
            (-value, node, token)
            for node, row in enumerate(zip(values[b].tolist(), top_ids[b].tolist()))
            for value, token in zip(*row)
        ]
        found = sorted(found)[:width]
        tokens.append([token for _, _, token in found])
        parents.append([slots[b, node].item() for _, node, _ in found])
        best.append([-value for value, _, _ in found])
    return tokens, parents, best


def assert_equals_sorting(logits, log_probs, slots, width, top_k):
    got = ops.expand_tree(logits, log_probs, slots, width=width, top_k=top_k)
    tokens, parents, best = by_sorting(logits, log_probs, slots, width, top_k)
    assert got.log_probs.tolist() == best  # to the last bit
    assert got.tokens.tolist() == tokens and got.parents.tolist() == parents


@pytest.mark.parametrize(
    ("shape", "width", "top_k"),
    [((1, 1, 1), 1, None), ((3, 4, 7), 5, 2), ((2, 3, 301), 9, None), (MANY, 5 * MANY[1], 5)],
    ids=str,
)
def test_equals_sorting_all_children(shape, width, top_k):
    logits = torch.randn(shape, dtype=EXACT)
    log_probs = -torch.rand(shape[:2], dtype=EXACT)
    slots = torch.randint(0, 64, shape[:2], dtype=torch.int32)
    if shape[1] > 2:
        log_probs[0, 1] = -math.inf  # padding
        logits[1, 2, 0] = math.nan
        logits[1, 0, 3] = -math.inf
    got = ops.expand_tree(logits, log_probs, slots, width=width, top_k=top_k)
    assert got.tokens.dtype == torch.int64 and got.parents.dtype == torch.int32
    # In float32 the log-sum-exp, its difference and its sum are off by their rounding, below 16.
    tolerance = 1e-14 if EXACT == torch.float64 else 3 * 16 * EPS
    for b in range(shape[0]):
        count = top_k or min(width, shape[2])
        exact = (logits[b].double(), log_probs[b].double())
        expected = children(*exact, slots[b], width, count)
        finite = [child for child in expected if child[0] < math.inf]
        kept = len(finite)
        gaps = [after[0] - before[0] for before, after in zip(finite, finite[1:])]
        assert min(gaps, default=1.0) > 2 * tolerance  # so that rounding cannot reorder them
        assert got.tokens[b, :kept].tolist() == [token for _, _, token, _ in finite]
        assert got.parents[b, :kept].tolist() == [slot for _, _, _, slot in finite]
        expected_log_probs = torch.tensor([-child[0] for child in expected], dtype=EXACT)
        torch.testing.assert_close(got.log_probs[b], expected_log_probs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "width", "top_k"),
    [((2, 5, 33), 7, 3), ((1, 4, 257), 32, 8), ((1, 13, 19), 65, 5), ((1, 5, 65), 64, 16)],
    ids=str,
)
def test_equals_sorting_to_the_last_bit(shape, width, top_k, dtype):
    """Some, all and one more than a multiple of 32 children; the type's ties included."""
    assert_equals_sorting(*arguments(shape, dtype), width, top_k)


@pytest.mark.parametrize("width", [64] if KERNEL else [64, 1024])
def test_the_largest_level(width):
    """64 nodes with 16 children each."""
    assert_equals_sorting(*arguments((1, 64, 40), torch.bfloat16), width, 16)


def test_ties_go_to_the_lower_node_then_to_the_lower_token():
    """Powers of two: every log-probability below is a sum of equal terms, whatever the order."""
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = -math.inf  # node 1: three tokens left, so each is more likely
    slots = torch.tensor([[9, 8, 7]], dtype=torch.int32)
    got = ops.expand_tree(logits, torch.zeros(1, 3), slots, width=8, top_k=3)
    assert got.tokens.tolist() == [[0, 1, 3, 0, 1, 2, 0, 1]]
    assert got.parents.tolist() == [[8, 8, 8, 9, 9, 9, 7, 7]]


def test_children_that_rounding_makes_equal():
    """The lower token first, although its logit is the lower one."""
    logits = torch.tensor([[[0.0, 1.0, 2.0, 3.0], [9.0, 1.0, 2.0, 3.0]]])
    log_probs = torch.full((1, 2), -(2.0**60))
    slots = torch.tensor([[1, 2]], dtype=torch.int32)
    got = ops.expand_tree(logits, log_probs, slots, width=6, top_k=3)
    assert got.tokens.tolist() == [[1, 2, 3, 0, 2, 3]]
    assert got.parents.tolist() == [[1, 1, 1, 2, 2, 2]]
    assert got.log_probs.eq(-(2.0**60)).all()


def test_padding_comes_last():
    """A padding node, a banned token, a row of NaN and one of -inf: all -inf, after the others."""
    logits, log_probs, slots = arguments((2, 5, 9))
    log_probs[0, 0] = -math.inf
    logits[0, 1, :7] = -math.inf
    logits[0, 2, 4] = math.nan  # its lse is NaN, so all its children are
    logits[0, 3] = -math.inf
    logits[1, 4, 2] = math.inf  # inf - inf, and -inf for the others
    log_probs[1, 0] = math.nan
    got = ops.expand_tree(logits, log_probs, slots, width=15, top_k=3)
    assert got.log_probs.isfinite().sum(1).tolist() == [5, 9]
    assert (got.log_probs[:, 1:] <= got.log_probs[:, :-1]).all() and not got.log_probs.isnan().any()
    for b, kept in enumerate((5, 9)):
        tokens, parents, best = by_sorting(logits, log_probs, slots, 15, 3)
        assert got.tokens[b, :kept].tolist() == tokens[b][:kept]
        assert got.parents[b, :kept].tolist() == parents[b][:kept]
        assert got.log_probs[b].tolist() == best[b]


def test_first_level():
    logits = torch.tensor([[[0.0, 3.0, 2.0, 1.0]]])
    got = ops.expand_tree(logits, torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int32), width=2)
    assert got.tokens.tolist() == [[1, 2]] and got.parents.tolist() == [[0, 0]]
    torch.testing.assert_close(got.log_probs, logits.log_softmax(-1)[:, 0, 1:3])


def test_strided_arguments():
    logits, log_probs, slots = arguments((4, 6, 70))
    views = (logits.transpose(0, 1), log_probs.t(), slots.t())
    views = tuple(view[::2, 1:] for view in views)
    got = ops.expand_tree(*views, width=9, top_k=4)
    expected = ops.expand_tree(*(view.contiguous() for view in views), width=9, top_k=4)
    assert all(map(torch.equal, got, expected))
    one_node = (logits[:, :1].expand(4, 6, 70), log_probs[:1].expand(4, 6), slots[:1].expand(4, 6))
    got = ops.expand_tree(*one_node, width=9, top_k=4)
    expected = ops.expand_tree(*(view.contiguous() for view in one_node), width=9, top_k=4)
    assert all(map(torch.equal, got, expected))


def test_bits_do_not_depend_on_the_batch():
    logits, log_probs, slots = arguments((3, 3, 1030), torch.bfloat16)
    expected = ops.expand_tree(logits, log_probs, slots, width=11, top_k=5)
    for rows in (slice(2, 3), slice(1, 3)):
        got = ops.expand_tree(logits[rows], log_probs[rows], slots[rows], width=11, top_k=5)
        assert all(torch.equal(x, y[rows]) for x, y in zip(got, expected))


def test_workspace_of_the_least_size():
    """Whatever it holds, and with nothing written past it."""
    given = arguments((2, 3, 1100))
    size = expand_tree_bytes(6, 1100, 5)
    memory = torch.full((size + 16,), 255, dtype=torch.uint8)  # NaN in every type
    got = ops.expand_tree(*given, width=7, top_k=5, workspace=memory[:size])
    assert all(map(torch.equal, got, ops.expand_tree(*given, width=7, top_k=5)))
    assert memory[size:].eq(255).all()
