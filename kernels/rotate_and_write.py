"""rotate_and_write: queries and keys turned by their positions; keys and values into the cache.

Reads / writes: q, k, v and what becomes of them once; cosines and sines once a head, from L2. Grid:
one program a sequence, slot and head (query heads, then those of the keys, then of the values), all
along x. Specification: lvspec.reference.rotate_and_write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.rounding import rounded


@triton.jit
def _combined(a, b, cos, sin, SIGN: tl.constexpr):
    """a cos + SIGN b sin, every product rounded to the type of its factors, as HF does."""
    product = rounded(a.to(tl.float32) * cos.to(tl.float32), a.dtype)
    other = rounded(b.to(tl.float32) * sin.to(tl.float32), a.dtype)
    return rounded(product.to(tl.float32) + SIGN * other.to(tl.float32), a.dtype)


@triton.jit
def _turn(source, cos, sin, target, target_stride, half, columns, mask, stored):
    """One head: `source`, its angles and `target` point to the first of its columns."""
    first = tl.load(source + columns, mask=mask)
    second = tl.load(source + half + columns, mask=mask)
    low = _combined(
        first, second, tl.load(cos + columns, mask=mask), tl.load(sin + columns, mask=mask), -1
    )
    cos, sin = cos + half, sin + half
    high = _combined(
        second, first, tl.load(cos + columns, mask=mask), tl.load(sin + columns, mask=mask), 1
    )
    tl.store(target + columns * target_stride, low, mask=stored)
    tl.store(target + (columns + half) * target_stride, high, mask=stored)


@triton.jit
def rotate_and_write_kernel(
    # inputs
    q,
    k,
    v,
    cos,
    sin,
    kv_len,
    # outputs
    turned,
    k_cache,
    v_cache,
    # sizes
    num_q_heads,
    num_kv_heads,
    num_slots,
    capacity,
    half,
    # strides
    q_stride_batch,
    q_stride_slot,
    k_stride_batch,
    k_stride_slot,
    v_stride_batch,
    v_stride_slot,
    cos_stride_batch,
    cos_stride_slot,
    sin_stride_batch,
    sin_stride_slot,
    kv_len_stride,
    k_cache_stride_batch,
    k_cache_stride_head,
    k_cache_stride_row,
    k_cache_stride_column,
    v_cache_stride_batch,
    v_cache_stride_head,
    v_cache_stride_row,
    v_cache_stride_column,
    # tiles
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    heads = num_q_heads + 2 * num_kv_heads
    head = program % heads
    slot = (program // heads % num_slots).to(tl.int64)
    sequence = (program // heads // num_slots).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    mask = columns < half

    cos += sequence * cos_stride_batch + slot * cos_stride_slot
    sin += sequence * sin_stride_batch + slot * sin_stride_slot
    row = tl.load(kv_len + sequence * kv_len_stride).to(tl.int64) + slot
    # A row that the cache does not have is not written.
    in_cache = columns < tl.where((row >= 0) & (row < capacity), half, 0)

    if head < num_q_heads:
        q += sequence * q_stride_batch + slot * q_stride_slot + head.to(tl.int64) * 2 * half
        turned += ((sequence * num_q_heads + head) * num_slots + slot) * 2 * half
        _turn(q, cos, sin, turned, 1, half, columns, mask, mask)
    elif head < num_q_heads + num_kv_heads:
        key_head = (head - num_q_heads).to(tl.int64)
        k += sequence * k_stride_batch + slot * k_stride_slot + key_head * 2 * half
        k_cache += sequence * k_cache_stride_batch + key_head * k_cache_stride_head
        k_cache += row * k_cache_stride_row
        _turn(k, cos, sin, k_cache, k_cache_stride_column, half, columns, mask, in_cache)
    else:
        value_head = (head - num_q_heads - num_kv_heads).to(tl.int64)
        v += sequence * v_stride_batch + slot * v_stride_slot + value_head * 2 * half
        v_cache += sequence * v_cache_stride_batch + value_head * v_cache_stride_head
        v_cache += row * v_cache_stride_row
        first = tl.load(v + columns, mask=mask)
        second = tl.load(v + half + columns, mask=mask)
        tl.store(v_cache + columns * v_cache_stride_column, first, mask=in_cache)
        tl.store(v_cache + (columns + half) * v_cache_stride_column, second, mask=in_cache)


# A head is so little that a warp has it in one load or two of each half.
_LAUNCH = {"num_warps": 1, "num_stages": 1}


def rotate_and_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layer: int,
    kv_len: torch.Tensor,
) -> torch.Tensor:
    """Launch `lvspec::rotate_and_write`."""
    q, k, v, cos, sin = (_with_whole_rows(x) for x in (q, k, v, cos, sin))
    k_cache, v_cache = k_cache[layer], v_cache[layer]
    batch_size, num_kv_heads, capacity, head_dim = k_cache.shape
    num_slots, num_q_heads = q.shape[1], q.shape[2] // head_dim
    turned = torch.empty(
        (batch_size, num_q_heads, num_slots, head_dim), dtype=q.dtype, device=q.device
    )
    grid = (batch_size * num_slots * (num_q_heads + 2 * num_kv_heads),)
    with launch.device_guard(q):
        rotate_and_write_kernel[grid](
            q=q,
            k=k,
            v=v,
            cos=cos,
            sin=sin,
            kv_len=kv_len,
            turned=turned,
            k_cache=k_cache,
            v_cache=v_cache,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            num_slots=num_slots,
            capacity=capacity,
            half=head_dim // 2,
            q_stride_batch=q.stride(0),
            q_stride_slot=q.stride(1),
            k_stride_batch=k.stride(0),
            k_stride_slot=k.stride(1),
            v_stride_batch=v.stride(0),
            v_stride_slot=v.stride(1),
            cos_stride_batch=cos.stride(0),
            cos_stride_slot=cos.stride(1),
            sin_stride_batch=sin.stride(0),
            sin_stride_slot=sin.stride(1),
            kv_len_stride=kv_len.stride(0),
            k_cache_stride_batch=k_cache.stride(0),
            k_cache_stride_head=k_cache.stride(1),
            k_cache_stride_row=k_cache.stride(2),
            k_cache_stride_column=k_cache.stride(3),
            v_cache_stride_batch=v_cache.stride(0),
            v_cache_stride_head=v_cache.stride(1),
            v_cache_stride_row=v_cache.stride(2),
            v_cache_stride_column=v_cache.stride(3),
            BLOCK=triton.next_power_of_2(head_dim // 2),
            **_LAUNCH,
        )
    return turned


def _with_whole_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
