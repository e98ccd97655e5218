"""commit_kv: the K/V of accepted slots move to where the sequence continues.

Reads / writes: every row that moves once each, K and V, at most
`4 * L * B * Hkv * num_accepted * D * itemsize` bytes; rows that stay are not touched. Grid: one
program a layer, sequence, KV head and chunk of D, all along x. Specification:
lvspec.reference.commit_kv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch


@triton.jit
def commit_kv_kernel(
    # inputs and outputs
    k_cache,
    v_cache,
    # inputs
    kv_len,
    path,
    num_accepted,
    # sizes
    batch_size,
    num_kv_heads,
    capacity,
    head_dim,
    num_slots,
    num_chunks,
    # strides
    k_stride_layer,
    k_stride_batch,
    k_stride_head,
    k_stride_row,
    k_stride_column,
    v_stride_layer,
    v_stride_batch,
    v_stride_head,
    v_stride_row,
    v_stride_column,
    kv_len_stride,
    path_stride_batch,
    path_stride_slot,
    num_accepted_stride,
    # tiles
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    chunk = program % num_chunks
    head = (program // num_chunks % num_kv_heads).to(tl.int64)
    sequence = (program // (num_chunks * num_kv_heads) % batch_size).to(tl.int64)
    layer = (program // (num_chunks * num_kv_heads) // batch_size).to(tl.int64)

    # Three independent loads, so that the programs with nothing to do wait for one round trip only.
    index = tl.arange(0, BLOCK_S)
    slots = tl.load(
        path + sequence * path_stride_batch + index.to(tl.int64) * path_stride_slot,
        mask=index < num_slots,
        other=-1,
    )
    count = tl.load(num_accepted + sequence * num_accepted_stride)
    length = tl.load(kv_len + sequence * kv_len_stride)

    source = length.to(tl.int64) + slots
    target = length.to(tl.int64) + index
    # A row that stays is left alone; a chain consists of such rows. With num_accepted -1 none is
    # named, with 0 it is the root, which stays.
    moves = (index <= count) & (slots >= 0) & (slots != index) & (source < capacity)
    if tl.max(moves.to(tl.int32), axis=0) == 0:
        return

    columns = (chunk * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask = moves[:, None] & (columns < head_dim)[None, :]
    k_base = k_cache + layer * k_stride_layer + sequence * k_stride_batch + head * k_stride_head
    v_base = v_cache + layer * v_stride_layer + sequence * v_stride_batch + head * v_stride_head
    k_columns = (columns * k_stride_column)[None, :]
    v_columns = (columns * v_stride_column)[None, :]
    keys = tl.load(k_base + source[:, None] * k_stride_row + k_columns, mask=mask)
    values = tl.load(v_base + source[:, None] * v_stride_row + v_columns, mask=mask)
    # Sources and targets overlap: no warp may write before all have read.
    tl.debug_barrier()
    tl.store(k_base + target[:, None] * k_stride_row + k_columns, keys, mask=mask)
    tl.store(v_base + target[:, None] * v_stride_row + v_columns, values, mask=mask)


# A program holds at most `tile_bytes` of K and as much of V, in registers: 8 loads of 16 bytes a
# thread of each, enough in flight to be bound by bandwidth, and 64 registers.
_LAUNCH = {"tile_bytes": 16384, "bytes_per_warp": 4096, "num_stages": 1}

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def commit_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    path: torch.Tensor,
    num_accepted: torch.Tensor,
) -> None:
    """Launch `lvspec.ops.commit_kv`."""
    # As integers, so that no bit pattern means anything to the hardware.
    bits = _BITS[k_cache.dtype.itemsize]
    k_cache, v_cache = k_cache.view(bits), v_cache.view(bits)
    if k_cache.dim() == 4:
        k_cache, v_cache = k_cache[None], v_cache[None]
    num_layers, batch_size, num_kv_heads, capacity, head_dim = k_cache.shape
    num_slots = path.shape[1]

    block_s = triton.next_power_of_2(num_slots)
    row_bytes = block_s * k_cache.itemsize
    block_d = min(triton.next_power_of_2(head_dim), _LAUNCH["tile_bytes"] // row_bytes)
    num_chunks = triton.cdiv(head_dim, block_d)
    num_warps = max(1, row_bytes * block_d // _LAUNCH["bytes_per_warp"])
    grid = (num_layers * batch_size * num_kv_heads * num_chunks,)
    with launch.device_guard(k_cache):
        commit_kv_kernel[grid](
            k_cache=k_cache,
            v_cache=v_cache,
            kv_len=kv_len,
            path=path,
            num_accepted=num_accepted,
            batch_size=batch_size,
            num_kv_heads=num_kv_heads,
            capacity=capacity,
            head_dim=head_dim,
            num_slots=num_slots,
            num_chunks=num_chunks,
            k_stride_layer=k_cache.stride(0),
            k_stride_batch=k_cache.stride(1),
            k_stride_head=k_cache.stride(2),
            k_stride_row=k_cache.stride(3),
            k_stride_column=k_cache.stride(4),
            v_stride_layer=v_cache.stride(0),
            v_stride_batch=v_cache.stride(1),
            v_stride_head=v_cache.stride(2),
            v_stride_row=v_cache.stride(3),
            v_stride_column=v_cache.stride(4),
            kv_len_stride=kv_len.stride(0),
            path_stride_batch=path.stride(0),
            path_stride_slot=path.stride(1),
            num_accepted_stride=num_accepted.stride(0),
            BLOCK_S=block_s,
            BLOCK_D=block_d,
            num_warps=num_warps,
            num_stages=_LAUNCH["num_stages"],
        )
