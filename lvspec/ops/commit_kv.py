"""commit_kv: K and V of accepted slots moved to where they stay."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec import reference
from lvspec.ops.checks import INT32, check, fail
from lvspec.ops.registry import define
from lvspec.tree import MAX_SLOTS


def commit_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    kv_len: Tensor,
    path: Tensor,
    num_accepted: Tensor,
) -> None:
    """Move the K/V of accepted slots, in place: `lvspec.reference.commit_kv`."""
    if k_cache.dim() not in (4, 5):
        fail("k_cache", "shape [L, B, Hkv, N, D] or [B, Hkv, N, D]", tuple(k_cache.shape))
    if path.dim() != 2:
        fail("path", "shape [B, S]", tuple(path.shape))
    device = k_cache.device
    batch_size, slots = k_cache.shape[-4], path.shape[1]
    check("v_cache", v_cache, (k_cache.dtype,), k_cache.shape, device)
    check("kv_len", kv_len, INT32, (batch_size,), device)
    check("path", path, INT32, (batch_size, slots), device)
    check("num_accepted", num_accepted, INT32, (batch_size,), device)
    if not 1 <= slots <= MAX_SLOTS:
        fail("path", f"1 to {MAX_SLOTS} slots S", slots)
    if k_cache.shape[-2] < slots:
        fail("k_cache", f"a capacity N of at least S = {slots}", k_cache.shape[-2])
    torch.ops.lvspec.commit_kv(k_cache, v_cache, kv_len, path, num_accepted)


def _shapes() -> None:
    return None


define("commit_kv", reference.commit_kv, _shapes, written=("k_cache", "v_cache"))
