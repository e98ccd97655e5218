"""rotate_and_write: queries and keys normed and turned by their positions; keys and values into
the cache.

Reads / writes: qkv and what becomes of it once; cosines and sines once a head, from L2. Grid:
one program a sequence, slot and head (query heads, then those of the keys, then of the values), all
along x. Specification: lvspec.reference.rotate_and_write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.launch import wait_for_kernels_ahead
from lvspec.kernels.rounding import rounded


@triton.jit
def _combined(a, b, cos, sin, SIGN: tl.constexpr):
    """a cos + SIGN b sin, every product rounded to the type of its factors, as HF does."""
    product = rounded(a.to(tl.float32) * cos.to(tl.float32), a.dtype)
    other = rounded(b.to(tl.float32) * sin.to(tl.float32), a.dtype)
    return rounded(product.to(tl.float32) + SIGN * other.to(tl.float32), a.dtype)


@triton.jit
def _normed(values, scale, factors):
    """Rounded twice, as rms_norm does."""
    first = rounded(values.to(tl.float32) * scale, values.dtype)
    return rounded(first.to(tl.float32) * factors.to(tl.float32), values.dtype)


@triton.jit
def _turn(
    source,
    norm,
    cos,
    sin,
    target,
    target_stride,
    half,
    eps,
    columns,
    mask,
    stored,
    HAS_NORM: tl.constexpr,
):
    """One head: `source`, its angles and `target` point to the first of its columns."""
    first = tl.load(source + columns, mask=mask, other=0.0)
    second = tl.load(source + half + columns, mask=mask, other=0.0)
    if HAS_NORM:
        squares = first.to(tl.float32) * first.to(tl.float32)
        squares += second.to(tl.float32) * second.to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, axis=0) / (2 * half) + eps)
        first = _normed(first, scale, tl.load(norm + columns, mask=mask, other=0.0))
        second = _normed(second, scale, tl.load(norm + half + columns, mask=mask, other=0.0))
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
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
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
    eps,
    # strides
    qkv_stride_batch,
    qkv_stride_slot,
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
    # flags
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
    # tiles
    BLOCK: tl.constexpr,
):
    if DEPENDENT:
        wait_for_kernels_ahead()
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

    source = qkv + sequence * qkv_stride_batch + slot * qkv_stride_slot
    source += head.to(tl.int64) * 2 * half

    if head < num_q_heads:
        target = turned + ((sequence * num_q_heads + head) * num_slots + slot) * 2 * half
        _turn(source, q_norm, cos, sin, target, 1, half, eps, columns, mask, mask, HAS_Q_NORM)
    elif head < num_q_heads + num_kv_heads:
        key_head = (head - num_q_heads).to(tl.int64)
        target = k_cache + sequence * k_cache_stride_batch + key_head * k_cache_stride_head
        target += row * k_cache_stride_row
        step = k_cache_stride_column
        _turn(
            source, k_norm, cos, sin, target, step, half, eps, columns, mask, in_cache, HAS_K_NORM
        )
    else:
        value_head = (head - num_q_heads - num_kv_heads).to(tl.int64)
        target = v_cache + sequence * v_cache_stride_batch + value_head * v_cache_stride_head
        target += row * v_cache_stride_row
        first = tl.load(source + columns, mask=mask)
        second = tl.load(source + half + columns, mask=mask)
        tl.store(target + columns * v_cache_stride_column, first, mask=in_cache)
        tl.store(target + (columns + half) * v_cache_stride_column, second, mask=in_cache)


# A head is so little that a warp has it in one load or two of each half.
_LAUNCH = {"num_warps": 1, "num_stages": 1}


def rotate_and_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layer: int,
    kv_len: torch.Tensor,
) -> torch.Tensor:
    """Launch `lvspec::rotate_and_write`."""
    qkv, cos, sin = (_with_whole_rows(x) for x in (qkv, cos, sin))
    k_cache, v_cache = k_cache[layer], v_cache[layer]
    batch_size, num_kv_heads, capacity, head_dim = k_cache.shape
    num_slots, num_q_heads = qkv.shape[1], qkv.shape[2] // head_dim - 2 * num_kv_heads
    turned = torch.empty(
        (batch_size, num_q_heads, num_slots, head_dim), dtype=qkv.dtype, device=qkv.device
    )
    grid = (batch_size * num_slots * (num_q_heads + 2 * num_kv_heads),)
    with launch.device_guard(qkv):
        rotate_and_write_kernel[grid](
            qkv=qkv,
            cos=cos,
            sin=sin,
            q_norm=q_norm,
            k_norm=k_norm,
            kv_len=kv_len,
            turned=turned,
            k_cache=k_cache,
            v_cache=v_cache,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            num_slots=num_slots,
            capacity=capacity,
            half=head_dim // 2,
            eps=eps,
            qkv_stride_batch=qkv.stride(0),
            qkv_stride_slot=qkv.stride(1),
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
            HAS_Q_NORM=q_norm is not None,
            HAS_K_NORM=k_norm is not None,
            DEPENDENT=launch.DEPENDENT,
            launch_pdl=launch.DEPENDENT,
            BLOCK=triton.next_power_of_2(head_dim // 2),
            **_LAUNCH,
        )
    return turned


def _with_whole_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
