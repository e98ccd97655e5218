"""logit_stats against sorting with (logit, id) as key and float64 sums."""

import math

import numpy
import pytest
import torch

from lvspec import ops
from lvspec.kernels.workspace import logit_stats_bytes

DTYPES = ops.float_dtypes("cpu")
KERNEL = ops.active_backend("cpu") == "triton"  # in its interpreter: fewer rows
FEW = 67 if not KERNEL else 11


def rank(row, top_k):
    row = [-math.inf if math.isnan(x) else x for x in row]
    return sorted(range(len(row)), key=lambda token: (-row[token], token))[:top_k]


def assert_ranked(logits, got):
    """Ids and logits of the best tokens are those of sorting, the logits bit for bit."""
    top_k = got.top_ids.shape[-1]
    assert got.top_ids.tolist() == [[rank(row, top_k) for row in rows] for rows in logits.tolist()]
    expected = logits.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    expected = expected.to(got.top_logits.dtype).gather(-1, got.top_ids.long())
    assert torch.equal(got.top_logits, expected)


def eager(x):
    return x.logsumexp(-1), torch.special.entr(x.softmax(-1)).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "top_k"),
    [
        ((1, 1, 1), 1),
        ((3, 5, 7), 7),
        ((2, 3, 257), 5),
        ((1, 2, 1023), 3),
        ((1, 3, 1024), 2),
        ((1, 2, 1031), 16),
        ((2, 1, 2048), 9),
        ((2, 2, 5121), 16),
        ((1, 1, 40_003), 8),
        ((1, 1, 152_064), 5),
        ((FEW, 1, 300), 4),
    ],
    ids=str,
)
def test_numbers(shape, top_k, dtype):
    logits = (3 * torch.randn(shape)).to(dtype)
    got = ops.logit_stats(logits, top_k=top_k)
    assert_ranked(logits, got)
    assert got.top_ids.dtype == torch.int32
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert {field.dtype for field in got[1:]} == {statistics}

    exact = eager(logits.double())
    for ours, theirs, truth in zip(got[2:], eager(logits), exact):
        rounding = torch.finfo(dtype).eps * (1 + truth.abs().max().item())
        rounding *= 8 if dtype == torch.float64 else 1  # nothing is more exact to compare with
        theirs = (theirs.double() - truth).abs().max().item()
        assert (ours.double() - truth).abs().max().item() <= 2 * max(theirs, rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_float32_whatever_the_type(dtype):
    """Against the eager sums of the same numbers in float32, not in their own coarser type."""
    logits = (5 * torch.randn(2, 3, 3001) + 20).to(dtype)
    got = ops.logit_stats(logits)
    statistics = got.lse.dtype
    for ours, theirs, truth in zip(got[2:], eager(logits.to(statistics)), eager(logits.double())):
        rounding = torch.finfo(statistics).eps * (1 + truth.abs().max().item())
        rounding *= 8 if statistics == torch.float64 else 1
        theirs = (theirs.double() - truth).abs().max().item()
        assert (ours.double() - truth).abs().max().item() <= 2 * max(theirs, rounding)


@pytest.mark.parametrize("vocabulary", [6, 255, 256, 257, 1500, 2049])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_ties_go_to_the_lower_id(vocabulary, top_k):
    """Few values, so that ties are everywhere, at the last rank as well; -inf and NaN too."""
    values = torch.tensor([0.0, -0.0, 1.0, 1.5, -math.inf, math.nan])
    spread = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.05, 0.05])
    rows = 8 if not KERNEL else 5
    choice = spread.multinomial(rows * vocabulary, replacement=True)
    logits = values[choice].view(1, rows, vocabulary)
    logits[0, 0] = -math.inf
    logits[0, 1] = math.nan
    logits[0, 2] = 2.5
    logits[0, 3, -3:] = 7.0
    assert_ranked(logits, ops.logit_stats(logits, top_k=top_k))


@pytest.mark.parametrize("top_k", [4, 16])
def test_where_the_best_tokens_lie(top_k):
    """In one place, in one place each, at both ends of runs of 32, 1,024 and 4,096, or nowhere."""
    vocabulary = 9000
    edges = torch.tensor([0, 31, 32, 1023, 1024, 2047, 2048, 4095, 4096, 8191, 8192, 8999])
    logits = torch.randn(1, 10, vocabulary).clamp_(-3, 3)
    logits[0, 0, 5000:5020] = torch.arange(20.0) + 9  # neighbours, the last the best
    logits[0, 1, 5000:5020] = 9.0 - torch.arange(20.0) / 8
    logits[0, 2, 40::500] = torch.arange(18.0) + 9  # two per run of 1,024
    logits[0, 3, 40::500] = 9.0  # the same, all equal
    logits[0, 4, edges] = torch.randn(12) + 9
    logits[0, 5, edges.flip(0)] = 9.0
    logits[0, 6] = -math.inf
    logits[0, 6, edges[::4]] = torch.tensor([-1.0, -1.0, -2.0])  # fewer than are asked for
    logits[0, 7] = -torch.arange(float(vocabulary))
    logits[0, 8] = torch.arange(float(vocabulary))
    logits[0, 9, edges] = math.nan
    logits[0, 9, edges + torch.tensor([1] * 11 + [-1])] = 9.0
    assert_ranked(logits, ops.logit_stats(logits, top_k=top_k))


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_irregular_long_rows(dtype):
    """What is irregular reaches the row from any part of it, and parts without mass add none."""
    inf, nan = math.inf, math.nan
    logits = torch.full((1, 10, 3000), -inf, dtype=dtype)
    logits[0, 0, 2500:2502] = 1.0  # all mass in the last third
    logits[0, 1, :2] = -300.0  # below what exp can tell from 0
    logits[0, 2, 1100:] = 2.0
    logits[0, 2, 2999] = nan
    logits[0, 3] = nan
    logits[0, 4, 10], logits[0, 4, 2000] = inf, nan
    logits[0, 5, 10], logits[0, 5, 2000] = inf, 3.0
    logits[0, 6, 2999] = inf
    logits[0, 7, 1024:2048] = nan
    logits[0, 7, :1024] = 0.0
    logits[0, 8, ::1024] = 60000.0
    logits[0, 8, 1::1024] = -60000.0
    # row 9: -inf throughout
    got = ops.logit_stats(logits)
    assert_ranked(logits, got)
    high = torch.tensor(60000.0).to(dtype).item()
    lse = [1 + math.log(2), -300 + math.log(2), nan, nan, nan, inf, inf, nan, high + math.log(3)]
    lse = torch.tensor([[*lse, -inf]], dtype=got.lse.dtype)
    torch.testing.assert_close(got.lse, lse, equal_nan=True, rtol=1e-6, atol=0)
    entropy = [math.log(2), math.log(2), nan, nan, nan, nan, nan, nan, math.log(3), nan]
    entropy = torch.tensor([entropy], dtype=got.lse.dtype)
    torch.testing.assert_close(got.entropy, entropy, equal_nan=True, rtol=1e-6, atol=0)


def test_extremes():
    """The widest logits of the type, and a row whose mass is on one token."""
    limit = torch.finfo(torch.float32).max
    logits = torch.tensor([[[limit, -limit, 0.0], [1000.0, 0.0, -1000.0]]])
    got = ops.logit_stats(logits, top_k=3)
    assert got.lse.tolist() == [[limit, 1000.0]]
    assert got.entropy.tolist() == [[0.0, 0.0]]


def test_strided_logits():
    logits = torch.randn(3, 7, 400).transpose(0, 1)[::2]
    got, expected = ops.logit_stats(logits), ops.logit_stats(logits.contiguous())
    assert all(map(torch.equal, got, expected))


def test_logits_whose_tokens_are_not_adjacent():
    """Views of the layout [V, S, B], every second token of a row, and one row for all.

    What adds them may do so in another order: 2^11 addends, a rounding of the sum per doubling.
    """
    by_token = torch.randn(1300, 2, 3).permute(2, 1, 0)
    every_second = torch.randn(2, 2, 2601)[..., 1::2]
    rtol = 11 * torch.finfo(torch.float32).eps
    for logits in (by_token, every_second, torch.randn(1200).expand(2, 2, -1)):
        got, expected = ops.logit_stats(logits), ops.logit_stats(logits.contiguous())
        assert all(map(torch.equal, got[:2], expected[:2]))
        torch.testing.assert_close(got[2:], expected[2:], rtol=rtol, atol=0)


@pytest.mark.parametrize("shape", [(3, 1, 50), (1, 3, 50), (1, 1, 3)], ids=["B", "S", "V"])
def test_offsets_past_32_bits(shape):
    """Two steps of 2^30 logits along one dimension; the pages between are never touched."""
    storage = torch.from_numpy(numpy.zeros(2**31 + 50, numpy.uint16)).view(torch.bfloat16)
    strides = [2**30 if size == 3 else 1 for size in shape]
    logits = storage.as_strided(shape, strides)
    logits.copy_(torch.randn(shape))
    got = ops.logit_stats(logits, top_k=2)
    assert_ranked(logits, got)
    torch.testing.assert_close(got.lse, logits.float().logsumexp(-1))


def test_bits_do_not_depend_on_batch_or_slots():
    for vocabulary in (257, 4099):
        logits = torch.randn(3, 4, vocabulary).bfloat16()
        expected = ops.logit_stats(logits, top_k=5)
        for rows in ((slice(1, 2), slice(2, 3)), (slice(1, 3), slice(2, 3)), (slice(2, 3),)):
            got = ops.logit_stats(logits[rows].contiguous(), top_k=5)
            assert all(torch.equal(x, y[rows]) for x, y in zip(got, expected))


def test_many_sequences():
    """More than 64; the rows are few and different, so that a swap would show."""
    logits = torch.randn(5, 1, 40)[torch.arange(70) % 5]
    got = ops.logit_stats(logits, top_k=2)
    assert_ranked(logits, got)
    assert all(torch.equal(field, field[:5].repeat(14, *[1] * (field.dim() - 1))) for field in got)


def test_no_rows():
    got = ops.logit_stats(torch.randn(0, 3, 40), top_k=2)
    assert [field.shape for field in got] == [(0, 3, 2), (0, 3, 2), (0, 3), (0, 3)]


def test_workspace_of_the_least_size():
    """Whatever it holds, and with nothing written past it."""
    logits = torch.randn(2, 3, 2100)
    size = logit_stats_bytes(6, 2100, 7)
    memory = torch.full((size + 16,), 255, dtype=torch.uint8)  # NaN in every type
    got = ops.logit_stats(logits, top_k=7, workspace=memory[:size])
    assert all(map(torch.equal, got, ops.logit_stats(logits, top_k=7)))
    assert memory[size:].eq(255).all()


@pytest.mark.skipif(not KERNEL, reason="of the Triton launcher")
@pytest.mark.parametrize("groups", [1, 3, 4, 100])
def test_groups_per_program_do_not_change_bits(groups, monkeypatch):
    """Large calls give a program several groups; here the table says so for small ones."""
    from lvspec.kernels import logit_stats as kernel

    logits = torch.randn(2, 2, 7 * 1024 + 5)
    logits[1, 1, 6 * 1024 :] = math.nan
    expected = ops.logit_stats(logits, top_k=3)
    monkeypatch.setitem(kernel._LAUNCH, "sm90", {**kernel._LAUNCH["sm90"], "groups": groups})
    monkeypatch.setitem(kernel._LAUNCH["sm90"], "programs", 1)
    got = ops.logit_stats(logits, top_k=3)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
