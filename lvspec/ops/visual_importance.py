"""visual_importance: the attention that each video position receives."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec import reference
from lvspec.ops.checks import INT32, UINT8, check, check_float, check_heads, fail, statistics_dtype
from lvspec.ops.registry import define


def visual_importance(
    q: Tensor,
    k_cache: Tensor,
    kv_len: Tensor,
    visual: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention that each video position receives: `lvspec.reference.visual_importance`."""
    if q.dim() != 4:
        fail("q", "shape [B, Hq, R, D]", tuple(q.shape))
    if k_cache.dim() != 4:
        fail("k_cache", "shape [B, Hkv, N, D]", tuple(k_cache.shape))
    check_float("q", q)
    device = q.device
    batch_size, num_q_heads, _, head_dim = q.shape
    num_kv_heads, capacity = k_cache.shape[1:3]
    check("k_cache", k_cache, (q.dtype,), (batch_size, num_kv_heads, capacity, head_dim), device)
    check_heads(num_q_heads, num_kv_heads)
    check("kv_len", kv_len, INT32, (batch_size,), device)
    check("visual", visual, UINT8, (batch_size, capacity), device)
    check("lse", lse, (statistics_dtype(q.dtype),), q.shape[:3], device)
    factor = head_dim**-0.5 if scale is None else scale
    return torch.ops.lvspec.visual_importance(q, k_cache, kv_len, visual, lse, factor)


def _shapes(q: Tensor, visual: Tensor) -> Tensor:
    return q.new_empty(visual.shape, dtype=statistics_dtype(q.dtype))


define("visual_importance", reference.visual_importance, _shapes)
