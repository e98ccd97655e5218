"""verify_attention: attention of the draft slots over the cache, and how much of it falls on video.

Reads `kv_len + S` rows of K and V per KV head once (`4 D` bytes a row in bfloat16) and q; writes
out, lse, mass and peak. Between its two kernels 4 `(D + 2)` bytes a row and piece go through the
workspace and stay in L2 if the pieces are long against the rows (see `piece_length`).
Grid: attend (row tiles, pieces + 1, B * Hkv), merge (B * Hq * S). Specification:
lvspec.reference.verify_attention.

The cache is cut into pieces that lie where they lie whatever else is in the batch: those of the
split plan, or such of fixed length. One program folds one piece for the query heads of a KV head
and all slots, packed as rows of one tile. The draft slots are piece 0, the only one with a mask of
ancestors. Under a plan a piece is wholly video or wholly text, so mass and peak follow from the
maximum and sum that every piece has anyway; without one the video bytes are read in the loop.

Rows give the same bits for any B, and for any S of the same BLOCK_M: pieces, BLOCK_N and the order
of merging do not depend on them, and hidden slots add exact zeros. For another BLOCK_M, which is
another matrix instruction or layout, a device may add a row's products in another order, so that
its floats differ by their rounding. (The interpreter's do not.)
"""

from __future__ import annotations

import torch
import triton

from lvspec.kernels import launch
from lvspec.kernels.verify_attention.attend import attend_kernel
from lvspec.kernels.verify_attention.launch_table import LAUNCH, launch_shape
from lvspec.kernels.verify_attention.merge import merge_kernel
from lvspec.kernels.workspace import MASKED_PIECE, num_masked_pieces

__all__ = ["LAUNCH", "MERGE", "verify_attention"]

MERGE = {"BLOCK_P": 64, "LISTED": 256, "num_warps": 8, "num_stages": 1}
"""A cache of 16k positions is two rounds of pieces, found in one look at its plan."""


def verify_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    visual: torch.Tensor,
    scale: float,
    block_table: torch.Tensor | None,
    plan_start: torch.Tensor | None,
    plan_end: torch.Tensor | None,
    plan_kind: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    scores: bool,
    workspace: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch both kernels; arguments as in the schema of `torch.ops.lvspec.verify_attention`."""
    batch_size, num_q_heads, num_slots, head_dim = q.shape
    num_kv_heads, capacity = k_cache.shape[1:3]
    page_size = 0
    if block_table is not None:
        page_size = capacity
        capacity *= block_table.shape[1]
    is_planned = plan_start is not None
    num_pieces = plan_start.shape[1] if is_planned else num_masked_pieces(capacity)
    piece = 0 if is_planned else MASKED_PIECE
    video_mask = scores and not is_planned
    rows = num_q_heads * num_slots
    group = num_q_heads // num_kv_heads

    shape = q.shape[:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse, mass, peak = (
        torch.empty(size, dtype=torch.float32, device=q.device)
        for size in (shape, shape if scores else (0,), shape if scores else (0,))
    )
    statistic = ((batch_size * rows, num_pieces + 1), torch.float32)
    partials = launch.carve(
        workspace,
        q.device,
        ((batch_size * rows, num_pieces + 1, head_dim), torch.float32),
        *[statistic] * (4 if video_mask else 2),
    )
    partial_out, partial_max, partial_sum = partials[:3]
    partial_video_max, partial_video_sum = partials[3:] or (partial_max, partial_sum)
    # These are small: a copy of one that is strided costs less than a stride of every table.
    kv_len = kv_len.contiguous()
    plan = [kv_len if table is None else table.contiguous() for table in (plan_start, plan_end)]
    plan.append(kv_len if plan_kind is None else plan_kind.contiguous())
    k_scale, v_scale = (
        None if factor is None else factor.expand(batch_size, num_kv_heads).contiguous()
        for factor in (k_scale, v_scale)
    )
    table = kv_len if block_table is None else block_table
    shape_of_launch = launch_shape(
        launch.device_class(q.device),
        head_dim,
        4 if q.dtype == torch.float32 else k_cache.element_size(),
        group * num_slots,
    )
    with launch.device_guard(q):
        attend_kernel[
            (
                triton.cdiv(group * num_slots, shape_of_launch["BLOCK_M"]),
                num_pieces + 1,
                batch_size * num_kv_heads,
            )
        ](
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            kv_len=kv_len,
            ancestors=ancestors,
            visual=visual,
            block_table=table,
            plan_start=plan[0],
            plan_end=plan[1],
            k_scale=k_scale,
            partial_out=partial_out,
            partial_max=partial_max,
            partial_sum=partial_sum,
            partial_video_max=partial_video_max,
            partial_video_sum=partial_video_sum,
            scale=scale,
            num_slots=num_slots,
            num_pieces=num_pieces,
            capacity=capacity,
            stride_q_sequence=q.stride(0),
            stride_q_head=q.stride(1),
            stride_q_slot=q.stride(2),
            stride_q_dim=q.stride(3),
            stride_k_sequence=k_cache.stride(0),
            stride_k_head=k_cache.stride(1),
            stride_k_row=k_cache.stride(2),
            stride_k_dim=k_cache.stride(3),
            stride_v_sequence=v_cache.stride(0),
            stride_v_head=v_cache.stride(1),
            stride_v_row=v_cache.stride(2),
            stride_v_dim=v_cache.stride(3),
            stride_ancestors_sequence=ancestors.stride(0),
            stride_ancestors_slot=ancestors.stride(1),
            stride_visual_sequence=visual.stride(0),
            stride_visual_position=visual.stride(1),
            stride_table_sequence=table.stride(0),
            stride_table_page=table.stride(-1),
            stride_plan_sequence=plan[0].stride(0),
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            PAGE_SIZE=page_size,
            PIECE=piece,
            VIDEO_MASK=video_mask,
            K_SCALED=k_scale is not None,
            DOT_IN_FLOAT32=launch.INTERPRETED and q.dtype == torch.bfloat16,
            **shape_of_launch,
        )
        merge_kernel[(batch_size * rows,)](
            partial_out=partial_out,
            partial_max=partial_max,
            partial_sum=partial_sum,
            partial_video_max=partial_video_max,
            partial_video_sum=partial_video_sum,
            kv_len=kv_len,
            plan_start=plan[0],
            plan_end=plan[1],
            plan_kind=plan[2],
            v_scale=v_scale,
            out=out,
            lse=lse,
            visual_mass=mass,
            visual_peak=peak,
            rows_per_sequence=rows,
            rows_per_head=group * num_slots,
            num_pieces=num_pieces,
            capacity=capacity,
            stride_plan_sequence=plan[0].stride(0),
            HEAD_DIM=head_dim,
            BLOCK_D=shape_of_launch["BLOCK_D"],
            PIECE=piece,
            SCORES=scores,
            V_SCALED=v_scale is not None,
            DEPENDENT=launch.DEPENDENT,
            launch_pdl=launch.DEPENDENT,
            **MERGE,
        )
    return out, lse, mass, peak
