"""visual_importance against the columns of a softmax."""

import math

import pytest
import torch

from lvspec import ops

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [  # B, Hq, Hkv, R, N, D
    (1, 1, 1, 1, 1, 1),
    (3, 6, 2, 5, 37, 9),
    (67, 2, 1, 3, 11, 5),
]
TILES = [
    (2, 6, 2, 25, 129, 33),  # one key, and 11 rows a head, more than fit into one tile
    (1, 4, 2, 32, 256, 16),  # tiles that are full to the edge
    (1, 14, 2, 19, 70, 64),
    (1, 2, 1, 3, 65, 256),
]
# Nothing is more exact than float64: over sums as long as those of TILES it cannot be measured.
CASES = [(sizes, dtype) for sizes in SIZES for dtype in ops.float_dtypes("cpu")]
CASES += [(sizes, dtype) for sizes in TILES for dtype in KERNEL_DTYPES]


@pytest.mark.parametrize(("sizes", "dtype"), CASES, ids=str)
def test_equals_columns_of_a_softmax(sizes, dtype):
    batch_size, num_q_heads, num_kv_heads, num_rows, capacity, head_dim = sizes
    q = torch.randn(batch_size, num_q_heads, num_rows, head_dim).to(dtype)
    k_cache = torch.randn(batch_size, num_kv_heads, capacity, head_dim).to(dtype)
    kv_len = torch.randint(1, capacity + 1, (batch_size,), dtype=torch.int32)
    visual = (torch.rand(batch_size, capacity) < 0.6).byte()
    committed = torch.arange(capacity) < kv_len[:, None]

    def eager(q, k_cache):
        keys = k_cache.repeat_interleave(num_q_heads // num_kv_heads, 1)
        logits = q @ keys.transpose(-1, -2) * head_dim**-0.5
        logits = logits.masked_fill(~committed[:, None, None], -math.inf)
        importance = logits.softmax(-1).sum((1, 2)) * visual
        return importance, logits.logsumexp(-1)

    exact, lse = eager(q.double(), k_cache.double())
    theirs = (eager(q, k_cache)[0].double() - exact).abs().max().item()
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    k_cache = k_cache.masked_fill(~committed[:, None, :, None], math.nan)
    got = ops.visual_importance(q, k_cache, kv_len, visual, lse.to(statistics))
    assert got.dtype == statistics
    # A sum that is handed in is rounded too, which moves every weight of its row.
    moved = torch.finfo(statistics).eps * lse.abs().max().item()
    rounding = (torch.finfo(dtype).eps + moved) * exact.max().item()
    assert (got - exact).abs().max().item() <= 2 * max(theirs, rounding)
    assert (got[(visual == 0) | ~committed] == 0).all()


def test_a_row_that_saw_nothing_adds_nothing():
    q, k_cache = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 5, 4)
    lse = torch.zeros(1, 2, 3)
    lse[:, 1] = -math.inf
    kv_len, visual = torch.tensor([5], dtype=torch.int32), torch.ones(1, 5, dtype=torch.uint8)
    got = ops.visual_importance(q, k_cache, kv_len, visual, lse)
    only = ops.visual_importance(q[:, :1], k_cache, kv_len, visual, lse[:, :1])
    torch.testing.assert_close(got, only)


def test_nan_in_rows_that_count_for_nothing():
    """In q where lse is -inf, in K at text positions; video stands in one run, as in a prompt."""
    q, k_cache = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 300, 4)
    kv_len = torch.tensor([290], dtype=torch.int32)
    visual = torch.zeros(1, 300, dtype=torch.uint8)
    visual[:, 130:141] = 255  # whole blocks of keys have none
    lse = torch.zeros(1, 2, 3)
    lse[:, 1] = -math.inf
    expected = ops.visual_importance(q, k_cache, kv_len, visual, lse)
    assert (expected[:, 130:141] > 0).all() and expected[visual == 0].abs().max() == 0
    q[:, 1] = math.nan
    k_cache = k_cache.masked_fill((visual == 0)[:, None, :, None], math.nan)
    assert torch.equal(ops.visual_importance(q, k_cache, kv_len, visual, lse), expected)


def problem(batch_size, num_q_heads, num_kv_heads, num_rows, capacity, head_dim):
    q = torch.randn(batch_size, num_q_heads, num_rows, head_dim)
    k_cache = torch.randn(batch_size, num_kv_heads, capacity, head_dim)
    kv_len = torch.randint(0, capacity + 1, (batch_size,), dtype=torch.int32)
    visual = (torch.rand(batch_size, capacity) < 0.6).byte()
    return q, k_cache, kv_len, visual, torch.randn(batch_size, num_q_heads, num_rows) + 3


def test_a_sequence_does_not_depend_on_the_others():
    arguments = problem(4, 6, 2, 7, 53, 9)
    together = ops.visual_importance(*arguments)
    for b in range(4):
        alone = ops.visual_importance(*(x[b : b + 1] for x in arguments))
        assert torch.equal(together[b : b + 1], alone)


def test_strided_views():
    q, k_cache, kv_len, visual, lse = problem(3, 4, 2, 5, 41, 7)
    expected = ops.visual_importance(q, k_cache, kv_len, visual, lse)
    layers = torch.full((2, 3, 50, 2, 9), math.nan)
    layers[1, :, :41, :, :7] = k_cache.transpose(1, 2)
    k_cache = layers[1].transpose(1, 2)[:, :, :41, :7]
    q = q.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    kv_len = kv_len.repeat_interleave(2)[::2]
    visual, lse = visual.T.contiguous().T, lse.transpose(0, 2).contiguous().transpose(0, 2)
    got = ops.visual_importance(q, k_cache, kv_len, visual, lse)
    torch.testing.assert_close(got, expected)


def test_scale():
    q, k_cache, kv_len, visual, lse = problem(2, 4, 2, 3, 17, 16)
    default = ops.visual_importance(q, k_cache, kv_len, visual, lse)
    assert torch.equal(default, ops.visual_importance(q, k_cache, kv_len, visual, lse, scale=0.25))
    twice = ops.visual_importance(q, k_cache, kv_len, visual, lse, scale=0.5)
    torch.testing.assert_close(twice, ops.visual_importance(2 * q, k_cache, kv_len, visual, lse))


def test_empty_cache():
    q, k_cache = torch.randn(2, 2, 3, 4), torch.full((2, 1, 5, 4), math.nan)
    kv_len, visual = torch.zeros(2, dtype=torch.int32), torch.ones(2, 5, dtype=torch.uint8)
    lse = torch.full((2, 2, 3), -math.inf)
    assert (ops.visual_importance(q, k_cache, kv_len, visual, lse) == 0).all()
