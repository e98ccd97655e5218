"""write_float8: rows of keys and values into a cache of a byte a number.

Reads / writes: keys and values, and a byte for each of their numbers, once. Grid: one program a
sequence, KV head and slot, all along x, for its key and its value. Specification:
lvspec.reference.float8.write_float8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.rounding import rounded_to_float8


@triton.jit
def _narrow(source, step, target, target_step, scale, columns, mask, stored):
    values = tl.load(source + columns * step, mask=mask, other=0.0).to(tl.float32) / scale
    tl.store(target + columns * target_step, rounded_to_float8(values), mask=stored)


@triton.jit
def write_float8_kernel(
    # inputs
    keys,
    values,
    k_scale,
    v_scale,
    kv_len,
    # outputs
    k_cache,
    v_cache,
    # sizes
    num_kv_heads,
    num_slots,
    capacity,
    head_dim,
    # strides
    keys_stride_batch,
    keys_stride_head,
    keys_stride_slot,
    keys_stride_column,
    values_stride_batch,
    values_stride_head,
    values_stride_slot,
    values_stride_column,
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
    slot = (program % num_slots).to(tl.int64)
    pair = program // num_slots  # of a sequence and a head
    head, sequence = (pair % num_kv_heads).to(tl.int64), (pair // num_kv_heads).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    row = tl.load(kv_len + sequence * kv_len_stride).to(tl.int64) + slot
    # A row that the cache does not have is not written.
    in_cache = columns < tl.where((row >= 0) & (row < capacity), head_dim, 0)
    mask = columns < head_dim

    source = keys + sequence * keys_stride_batch + head * keys_stride_head
    target = k_cache + sequence * k_cache_stride_batch + head * k_cache_stride_head
    source, target = source + slot * keys_stride_slot, target + row * k_cache_stride_row
    factor = tl.load(k_scale + pair)
    _narrow(
        source, keys_stride_column, target, k_cache_stride_column, factor, columns, mask, in_cache
    )
    source = values + sequence * values_stride_batch + head * values_stride_head
    target = v_cache + sequence * v_cache_stride_batch + head * v_cache_stride_head
    source, target = source + slot * values_stride_slot, target + row * v_cache_stride_row
    factor = tl.load(v_scale + pair)
    _narrow(
        source, values_stride_column, target, v_cache_stride_column, factor, columns, mask, in_cache
    )


# A row is so little that a warp has it in one load or two.
_LAUNCH = {"num_warps": 1, "num_stages": 1}


def write_float8(
    keys: torch.Tensor,
    values: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    layer: int,
    kv_len: torch.Tensor,
) -> None:
    """Launch `lvspec::write_float8`."""
    k_cache, v_cache = k_cache[layer], v_cache[layer]
    batch_size, num_kv_heads, num_slots, head_dim = keys.shape
    with launch.device_guard(keys):
        write_float8_kernel[(batch_size * num_kv_heads * num_slots,)](
            keys=keys,
            values=values,
            k_scale=k_scale[layer],
            v_scale=v_scale[layer],
            kv_len=kv_len,
            k_cache=k_cache,
            v_cache=v_cache,
            num_kv_heads=num_kv_heads,
            num_slots=num_slots,
            capacity=k_cache.shape[2],
            head_dim=head_dim,
            keys_stride_batch=keys.stride(0),
            keys_stride_head=keys.stride(1),
            keys_stride_slot=keys.stride(2),
            keys_stride_column=keys.stride(3),
            values_stride_batch=values.stride(0),
            values_stride_head=values.stride(1),
            values_stride_slot=values.stride(2),
            values_stride_column=values.stride(3),
            kv_len_stride=kv_len.stride(0),
            k_cache_stride_batch=k_cache.stride(0),
            k_cache_stride_head=k_cache.stride(1),
            k_cache_stride_row=k_cache.stride(2),
            k_cache_stride_column=k_cache.stride(3),
            v_cache_stride_batch=v_cache.stride(0),
            v_cache_stride_head=v_cache.stride(1),
            v_cache_stride_row=v_cache.stride(2),
            v_cache_stride_column=v_cache.stride(3),
            BLOCK=triton.next_power_of_2(head_dim),
            **_LAUNCH,
        )
