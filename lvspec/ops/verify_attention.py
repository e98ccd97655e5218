"""verify_attention: attention of the draft slots over the cache, and how much falls on video."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lvspec import reference
from lvspec.kernels.workspace import num_masked_pieces, verify_attention_bytes
from lvspec.ops.backends import active_backend, float_dtypes
from lvspec.ops.checks import (
    INT32,
    INT64,
    UINT8,
    check,
    check_float,
    check_heads,
    check_workspace,
    fail,
    names,
    statistics_dtype,
)
from lvspec.ops.registry import define
from lvspec.reference import SplitPlan, VerifyAttention
from lvspec.tree import MAX_SLOTS

MAX_HEAD_DIM = 256
"""The largest head dimension that kernels take; the reference takes any."""

_FP8 = torch.float8_e4m3fn


def verify_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_len: Tensor,
    ancestors: Tensor,
    visual: Tensor,
    *,
    scale: float | None = None,
    block_table: Tensor | None = None,
    plan: SplitPlan | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    scores: bool = True,
    workspace: Tensor | None = None,
) -> VerifyAttention:
    """Attention of the draft slots over cache and tree: `lvspec.reference.verify_attention`."""
    # One by one, the checks take longer than attention over a short cache: most calls skip them.
    if (
        plan is not None
        or block_table is not None
        or k_scale is not None
        or v_scale is not None
        or workspace is not None
        or not _fit_without_options(q, k_cache, v_cache, kv_len, ancestors, visual)
    ):
        _check_attention(
            q,
            k_cache,
            v_cache,
            kv_len,
            ancestors,
            visual,
            block_table=block_table,
            plan=plan,
            k_scale=k_scale,
            v_scale=v_scale,
            workspace=workspace,
        )
    start, end, kind = (None, None, None) if plan is None else plan
    out, lse, mass, peak = torch.ops.lvspec.verify_attention(
        q,
        k_cache,
        v_cache,
        kv_len,
        ancestors,
        visual,
        q.shape[3] ** -0.5 if scale is None else scale,
        block_table,
        start,
        end,
        kind,
        k_scale,
        v_scale,
        scores,
        workspace,
    )
    return (
        VerifyAttention(out, lse, mass, peak) if scores else VerifyAttention(out, lse, None, None)
    )


def _fit_without_options(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_len: Tensor,
    ancestors: Tensor,
    visual: Tensor,
) -> bool:
    """Whether the tensors of a plain verify_attention fit; if not, `_check_attention` says why."""
    shape, stored, dtype, device = q.shape, k_cache.shape, q.dtype, q.device
    if len(shape) != 4 or len(stored) != 4:
        return False
    batch_size, num_q_heads, num_slots, head_dim = shape
    stored_batch, num_kv_heads, capacity, stored_dim = stored
    return (
        stored_batch == batch_size >= 1
        and stored_dim == head_dim
        and 1 <= num_slots <= MAX_SLOTS
        and num_slots <= capacity
        and num_kv_heads >= 1
        and num_q_heads % num_kv_heads == 0
        and 1 <= head_dim <= MAX_HEAD_DIM
        and v_cache.shape == stored
        and kv_len.shape == (batch_size,)
        and ancestors.shape == (batch_size, num_slots)
        and visual.shape == (batch_size, capacity)
        and k_cache.dtype is dtype
        and v_cache.dtype is dtype
        and kv_len.dtype is torch.int32
        and ancestors.dtype is torch.int64
        and visual.dtype is torch.uint8
        and k_cache.device == device
        and v_cache.device == device
        and kv_len.device == device
        and ancestors.device == device
        and visual.device == device
        and dtype in float_dtypes(device.type)
    )


def _check_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_len: Tensor,
    ancestors: Tensor,
    visual: Tensor,
    *,
    block_table: Tensor | None,
    plan: SplitPlan | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    workspace: Tensor | None,
) -> None:
    """Raise ValueError for the first argument of verify_attention that does not fit."""
    if q.dim() != 4:
        fail("q", "shape [B, Hq, S, D]", tuple(q.shape))
    if k_cache.dim() != 4:
        fail("k_cache", "4 dimensions", tuple(k_cache.shape))
    device = q.device
    batch_size, num_q_heads, num_slots, head_dim = q.shape
    num_kv_heads, capacity = k_cache.shape[1:3]
    stored = (q.dtype, _FP8)
    check_float("q", q)
    _check_head_dim(head_dim, device)
    if batch_size < 1:
        fail("q", "at least one sequence", batch_size)
    if not 1 <= num_slots <= MAX_SLOTS:
        fail("q", f"1 to {MAX_SLOTS} slots S", num_slots)
    if block_table is None:
        check("k_cache", k_cache, stored, (batch_size, num_kv_heads, capacity, head_dim), device)
    else:
        if block_table.dim() != 2:
            fail("block_table", "shape [B, max_pages]", tuple(block_table.shape))
        check("block_table", block_table, INT32, (batch_size, block_table.shape[1]), device)
        check("k_cache", k_cache, stored, (*k_cache.shape[:3], head_dim), device)
        capacity *= block_table.shape[1]
    check("v_cache", v_cache, (k_cache.dtype,), k_cache.shape, device)
    check_heads(num_q_heads, num_kv_heads)
    for name, factor in (("k_scale", k_scale), ("v_scale", v_scale)):
        if factor is not None:
            shape = (num_kv_heads,) if factor.dim() == 1 else (batch_size, num_kv_heads)
            check(name, factor, (torch.float32,), shape, device)
        elif k_cache.dtype == _FP8:
            fail(name, f"a factor per KV head, for the cache is {names((_FP8,))}", None)
    _check_float8(k_cache)
    if capacity < num_slots:
        fail("k_cache", f"a capacity N of at least S = {num_slots}", capacity)
    check("kv_len", kv_len, INT32, (batch_size,), device)
    check("ancestors", ancestors, INT64, (batch_size, num_slots), device)
    check("visual", visual, UINT8, (batch_size, capacity), device)
    if plan is not None:
        if plan[0].dim() != 2:
            fail("plan.start", "shape [B, P]", tuple(plan[0].shape))
        for name, table in zip(SplitPlan._fields, plan):
            check(f"plan.{name}", table, INT32, (batch_size, plan[0].shape[1]), device)
    pieces = num_masked_pieces(capacity) if plan is None else plan[0].shape[1]
    needed = verify_attention_bytes(batch_size, num_q_heads, num_slots, head_dim, pieces)
    check_workspace(workspace, device, needed)


def _check_float8(cache: Tensor) -> None:
    if cache.dtype == _FP8 and cache.is_cuda:
        capability = torch.cuda.get_device_capability(cache.device)
        if capability < (8, 9):
            got = f"{capability[0]}.{capability[1]}"
            fail("k_cache", "compute capability 8.9 or more for float8_e4m3fn", got)


def _check_head_dim(head_dim: int, device: torch.device) -> None:
    most = None if active_backend(device.type) == "reference" else MAX_HEAD_DIM
    if most is not None and not 1 <= head_dim <= most:
        fail("q", f"a head dimension D from 1 to {most}", head_dim)


@functools.wraps(reference.verify_attention)
def _specification(**arguments: Any) -> tuple[Tensor, ...]:
    """An operation returns tensors: empty ones where there are no scores."""
    out, lse, mass, peak = reference.verify_attention(**arguments)
    if not arguments["scores"]:
        mass, peak = lse.new_empty(0), lse.new_empty(0)
    return out, lse, mass, peak


def _shapes(q: Tensor, scores: bool) -> tuple[Tensor, ...]:
    shape, dtype = q.shape[:3], statistics_dtype(q.dtype)
    score_shape = shape if scores else (0,)
    return (
        q.new_empty(q.shape),
        q.new_empty(shape, dtype=dtype),
        q.new_empty(score_shape, dtype=dtype),
        q.new_empty(score_shape, dtype=dtype),
    )


define("verify_attention", _specification, _shapes, scratch=True)
