"""expand_tree against sorting every child of every node."""

import math

import pytest
import torch

from lvspec import ops


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


@pytest.mark.parametrize(
    ("shape", "width", "top_k"),
    [((1, 1, 1), 1, None), ((3, 4, 7), 5, 2), ((2, 3, 301), 9, None), ((67, 2, 5), 10, 5)],
    ids=str,
)
def test_equals_sorting_all_children(shape, width, top_k):
    logits = torch.randn(shape, dtype=torch.float64)
    log_probs = -torch.rand(shape[:2], dtype=torch.float64)
    slots = torch.randint(0, 64, shape[:2], dtype=torch.int32)
    if shape[1] > 2:
        log_probs[0, 1] = -math.inf  # padding
        logits[1, 2, 0] = math.nan
        logits[1, 0, 3] = -math.inf
    got = ops.expand_tree(logits, log_probs, slots, width=width, top_k=top_k)
    assert got.tokens.dtype == torch.int64 and got.parents.dtype == torch.int32
    for b in range(shape[0]):
        count = top_k or min(width, shape[2])
        expected = children(logits[b], log_probs[b], slots[b], width, count)
        finite = [child for child in expected if child[0] < math.inf]
        kept = len(finite)
        assert got.tokens[b, :kept].tolist() == [token for _, _, token, _ in finite]
        assert got.parents[b, :kept].tolist() == [slot for _, _, _, slot in finite]
        expected_log_probs = torch.tensor([-child[0] for child in expected], dtype=torch.float64)
        torch.testing.assert_close(got.log_probs[b], expected_log_probs, rtol=0, atol=1e-14)


def test_ties_go_to_the_lower_node_then_to_the_lower_token():
    """Powers of two: every log-probability below is a sum of equal terms, whatever the order."""
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = -math.inf  # node 1: three tokens left, so each is more likely
    slots = torch.tensor([[9, 8, 7]], dtype=torch.int32)
    got = ops.expand_tree(logits, torch.zeros(1, 3), slots, width=8, top_k=3)
    assert got.tokens.tolist() == [[0, 1, 3, 0, 1, 2, 0, 1]]
    assert got.parents.tolist() == [[8, 8, 8, 9, 9, 9, 7, 7]]


def test_first_level():
    logits = torch.tensor([[[0.0, 3.0, 2.0, 1.0]]])
    got = ops.expand_tree(logits, torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int32), width=2)
    assert got.tokens.tolist() == [[1, 2]] and got.parents.tolist() == [[0, 0]]
    torch.testing.assert_close(got.log_probs, logits.log_softmax(-1)[:, 0, 1:3])
