"""visual_importance: which video positions the given queries look at.

Reads / writes: K of every block of keys with a video position, once; q and lse once a block, from
L2; `5 * B * N` bytes of marks and results. Grid: one program a sequence and block of keys, along x.
Specification: lvspec.reference.visual_importance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch


@triton.jit
def visual_importance_kernel(
    # inputs
    q,
    k_cache,
    kv_len,
    visual,
    lse,
    # outputs
    importance,
    # sizes
    num_kv_heads,
    group,
    num_rows,
    capacity,
    head_dim,
    num_blocks,
    scale,
    # strides
    q_stride_batch,
    q_stride_head,
    q_stride_row,
    q_stride_column,
    k_stride_batch,
    k_stride_head,
    k_stride_row,
    k_stride_column,
    kv_len_stride,
    visual_stride_batch,
    visual_stride_row,
    lse_stride_batch,
    lse_stride_head,
    lse_stride_row,
    # flags
    DOT_IN_FLOAT32: tl.constexpr,
    # tiles
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    sequence = (program // num_blocks).to(tl.int64)
    positions = program % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = positions.to(tl.int64)

    marks = tl.load(
        visual + sequence * visual_stride_batch + rows * visual_stride_row,
        mask=positions < capacity,
        other=0,
    )
    length = tl.load(kv_len + sequence * kv_len_stride)
    counted = (marks != 0) & (positions < length)

    total = tl.zeros((BLOCK_N,), tl.float32)
    if tl.max(counted.to(tl.int32), axis=0) != 0:
        columns = tl.arange(0, BLOCK_D)
        in_head = columns < head_dim
        offsets = columns.to(tl.int64)
        k_mask = counted[:, None] & in_head[None, :]
        k_tile = k_cache + sequence * k_stride_batch
        k_tile += rows[:, None] * k_stride_row + (offsets * k_stride_column)[None, :]
        q_base = q + sequence * q_stride_batch
        lse_base = lse + sequence * lse_stride_batch
        for kv_head in range(num_kv_heads):
            keys = tl.load(k_tile, mask=k_mask, other=0.0)
            k_tile += k_stride_head
            for start in range(0, group * num_rows, BLOCK_M):
                # Rows of all query heads of this KV head, one head behind the other.
                member = start + tl.arange(0, BLOCK_M)
                in_group = member < group * num_rows
                head = (kv_head * group + member // num_rows).to(tl.int64)
                row = (member % num_rows).to(tl.int64)
                norm = tl.load(
                    lse_base + head * lse_stride_head + row * lse_stride_row,
                    mask=in_group,
                    other=float("-inf"),
                )
                q_rows = head * q_stride_head + row * q_stride_row
                queries = tl.load(
                    q_base + q_rows[None, :] + (offsets * q_stride_column)[:, None],
                    mask=in_group[None, :] & in_head[:, None],
                    other=0.0,
                )
                if DOT_IN_FLOAT32:
                    scores = tl.dot(
                        keys.to(tl.float32), queries.to(tl.float32), input_precision="ieee"
                    )
                else:
                    scores = tl.dot(keys, queries, input_precision="ieee")
                weights = tl.exp(scores * scale - norm[None, :])
                # Rows that do not exist, or saw nothing: a NaN in their q must not win over the 0.
                weights = tl.where(norm[None, :] == float("-inf"), 0.0, weights)
                total += tl.sum(weights, axis=1)
    tl.store(
        importance + sequence * capacity + rows,
        tl.where(counted, total, 0.0),
        mask=positions < capacity,
    )


# By bytes per number and largest head dimension. The larger the block of keys, the fewer times q
# comes from L2; what bounds it is registers, of which none may spill with triton 3.6, 3.7 or 3.9.
_LAUNCH = {
    "sm80": {
        (2, 64): {"block_m": 32, "block_n": 64, "num_warps": 4, "num_stages": 2},
        (2, 128): {"block_m": 32, "block_n": 64, "num_warps": 4, "num_stages": 2},
        (2, 256): {"block_m": 16, "block_n": 64, "num_warps": 8, "num_stages": 2},
        (4, 64): {"block_m": 32, "block_n": 16, "num_warps": 4, "num_stages": 1},
        (4, 128): {"block_m": 32, "block_n": 16, "num_warps": 4, "num_stages": 1},
        (4, 256): {"block_m": 16, "block_n": 16, "num_warps": 8, "num_stages": 1},
    },
    "sm90": {
        (2, 64): {"block_m": 64, "block_n": 128, "num_warps": 8, "num_stages": 3},
        (2, 128): {"block_m": 64, "block_n": 128, "num_warps": 8, "num_stages": 3},
        (2, 256): {"block_m": 64, "block_n": 64, "num_warps": 8, "num_stages": 2},
        (4, 64): {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1},
        (4, 128): {"block_m": 16, "block_n": 16, "num_warps": 8, "num_stages": 1},
        (4, 256): {"block_m": 16, "block_n": 16, "num_warps": 8, "num_stages": 1},
    },
    "sm100": {
        (2, 64): {"block_m": 64, "block_n": 64, "num_warps": 8, "num_stages": 3},
        (2, 128): {"block_m": 32, "block_n": 64, "num_warps": 4, "num_stages": 2},
        (2, 256): {"block_m": 32, "block_n": 64, "num_warps": 4, "num_stages": 2},
        (4, 64): {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1},
        (4, 128): {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1},
        (4, 256): {"block_m": 16, "block_n": 16, "num_warps": 8, "num_stages": 1},
    },
}


def visual_importance(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    kv_len: torch.Tensor,
    visual: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Launch `lvspec.ops.visual_importance`."""
    batch_size, num_q_heads, num_rows, head_dim = q.shape
    num_kv_heads, capacity = k_cache.shape[1:3]
    group = num_q_heads // num_kv_heads
    importance = torch.empty((batch_size, capacity), dtype=torch.float32, device=q.device)

    block_d = max(16, triton.next_power_of_2(head_dim))
    table = _LAUNCH[launch.device_class(q.device)][q.itemsize, max(64, block_d)]
    block_m = 16 if group * num_rows <= 16 else table["block_m"]
    block_n = table["block_n"]
    num_blocks = triton.cdiv(capacity, block_n)
    with launch.device_guard(q):
        visual_importance_kernel[(batch_size * num_blocks,)](
            q=q,
            k_cache=k_cache,
            kv_len=kv_len,
            visual=visual,
            lse=lse,
            importance=importance,
            num_kv_heads=num_kv_heads,
            group=group,
            num_rows=num_rows,
            capacity=capacity,
            head_dim=head_dim,
            num_blocks=num_blocks,
            scale=scale,
            q_stride_batch=q.stride(0),
            q_stride_head=q.stride(1),
            q_stride_row=q.stride(2),
            q_stride_column=q.stride(3),
            k_stride_batch=k_cache.stride(0),
            k_stride_head=k_cache.stride(1),
            k_stride_row=k_cache.stride(2),
            k_stride_column=k_cache.stride(3),
            kv_len_stride=kv_len.stride(0),
            visual_stride_batch=visual.stride(0),
            visual_stride_row=visual.stride(1),
            lse_stride_batch=lse.stride(0),
            lse_stride_head=lse.stride(1),
            lse_stride_row=lse.stride(2),
            DOT_IN_FLOAT32=launch.INTERPRETED and q.dtype == torch.bfloat16,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=table["num_warps"],
            num_stages=table["num_stages"],
        )
    return importance
