"""logit_stats against sorting with (logit, id) as key and float64 sums."""

import math

import pytest
import torch

from lvspec import ops


def rank(row, top_k):
    row = [-math.inf if math.isnan(x) else x for x in row]
    return sorted(range(len(row)), key=lambda token: (-row[token], token))[:top_k]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "top_k"),
    [((1, 1, 1), 1), ((3, 5, 7), 7), ((2, 3, 257), 5), ((1, 2, 1031), 16), ((67, 1, 300), 4)],
    ids=str,
)
def test_numbers(shape, top_k, dtype):
    logits = (3 * torch.randn(shape)).to(dtype)
    got = ops.logit_stats(logits, top_k=top_k)
    ids = [[rank(row, top_k) for row in rows] for rows in logits.double().tolist()]
    assert got.top_ids.tolist() == ids and got.top_ids.dtype == torch.int32
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert {field.dtype for field in got[1:]} == {statistics}
    assert torch.equal(got.top_logits, logits.to(statistics).gather(-1, got.top_ids.long()))

    def eager(x):
        return x.logsumexp(-1), torch.special.entr(x.softmax(-1)).sum(-1)

    exact = eager(logits.double())
    for ours, theirs, truth in zip(got[2:], eager(logits), exact):
        rounding = torch.finfo(dtype).eps * (1 + truth.abs().max().item())
        rounding *= 8 if dtype == torch.float64 else 1  # nothing is more exact to compare with
        theirs = (theirs.double() - truth).abs().max().item()
        assert (ours.double() - truth).abs().max().item() <= 2 * max(theirs, rounding)


@pytest.mark.parametrize("vocabulary", [6, 255, 256, 257, 1500])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_ties_go_to_the_lower_id(vocabulary, top_k):
    """Few values, so that ties are everywhere, at the last rank as well; -inf and NaN too."""
    values = torch.tensor([0.0, -0.0, 1.0, 1.5, -math.inf, math.nan])
    spread = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.05, 0.05])
    choice = spread.multinomial(40 * vocabulary, replacement=True)
    logits = values[choice].view(5, 8, vocabulary)
    logits[0, 0] = -math.inf
    logits[0, 1] = math.nan
    logits[0, 2] = 2.5
    logits[0, 3, -3:] = 7.0
    got = ops.logit_stats(logits, top_k=top_k)
    assert got.top_ids.tolist() == [[rank(row, top_k) for row in rows] for rows in logits.tolist()]
    assert not got.top_logits.isnan().any()


def test_irregular_rows():
    row = torch.zeros(300)
    rows = torch.stack([row, row.clone(), row.clone(), row.clone(), row.clone()])
    rows[0, 7] = -math.inf
    rows[1, 7] = math.nan
    rows[2, 7] = math.inf
    rows[3, 7:9] = math.inf
    rows[4] = -math.inf
    got = ops.logit_stats(rows[None])
    expected = torch.tensor([[math.log(299), math.nan, math.inf, math.inf, -math.inf]])
    torch.testing.assert_close(got.lse, expected, equal_nan=True)
    assert got.entropy.isnan().tolist() == [[False, True, True, True, True]]
    torch.testing.assert_close(got.entropy[0, 0], torch.tensor(math.log(299)))
    assert got.top_ids[0, :, 0].tolist() == [0, 0, 7, 7, 0]


def test_extremes():
    """The widest logits of the type, and a row whose mass is on one token."""
    limit = torch.finfo(torch.float32).max
    logits = torch.tensor([[[limit, -limit, 0.0], [1000.0, 0.0, -1000.0]]])
    got = ops.logit_stats(logits, top_k=3)
    assert got.lse.tolist() == [[limit, 1000.0]]
    assert got.entropy.tolist() == [[0.0, 0.0]]


def test_strided_logits():
    logits = torch.randn(3, 7, 400).transpose(0, 1)
    got, expected = ops.logit_stats(logits), ops.logit_stats(logits.contiguous())
    assert all(map(torch.equal, got, expected))
