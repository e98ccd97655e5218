"""visual_importance against the columns of a softmax."""

import math

import pytest
import torch

from lvspec import ops


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1, 1), (3, 6, 2, 5, 37, 9), (67, 2, 1, 3, 11, 5)], ids=str
)
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
    rounding = torch.finfo(dtype).eps * exact.max().item()
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


def test_empty_cache():
    q, k_cache = torch.randn(2, 2, 3, 4), torch.full((2, 1, 5, 4), math.nan)
    kv_len, visual = torch.zeros(2, dtype=torch.int32), torch.ones(2, 5, dtype=torch.uint8)
    lse = torch.full((2, 2, 3), -math.inf)
    assert (ops.visual_importance(q, k_cache, kv_len, visual, lse) == 0).all()
