"""The pieces of a row, added in order."""

from __future__ import annotations

import triton
import triton.language as tl

from lvspec.kernels.launch import wait_for_kernels_ahead
from lvspec.kernels.verify_attention.attend import LOWEST


@triton.jit(do_not_specialize=["rows_per_sequence", "rows_per_head", "num_pieces", "capacity"])
def merge_kernel(
    partial_out,
    partial_max,
    partial_sum,
    partial_video_max,
    partial_video_sum,
    kv_len,
    plan_start,
    plan_end,
    plan_kind,
    v_scale,
    out,
    lse,
    visual_mass,
    visual_peak,
    rows_per_sequence,
    rows_per_head,  # of keys and values
    num_pieces,
    capacity,
    stride_plan_sequence,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr,
    SCORES: tl.constexpr,
    V_SCALED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_P: tl.constexpr,  # pieces that are added at once
    LISTED: tl.constexpr,  # entries of the plan that are looked at at once
):
    """The pieces of one row, added in order."""
    if DEPENDENT:
        wait_for_kernels_ahead()
    row = tl.program_id(0).to(tl.int64)
    sequence = row // rows_per_sequence
    length = tl.minimum(tl.load(kv_len + sequence), capacity)
    first_offset = row * (num_pieces + 1)
    dim = tl.arange(0, BLOCK_D)

    # What is behind the last piece that has been written is not looked at again.
    if PIECE > 0:
        count = tl.cdiv(length, PIECE) + 1
    else:
        last = tl.zeros([LISTED], tl.int32)
        for first in tl.range(0, num_pieces + 1, LISTED):
            piece = first + tl.arange(0, LISTED)
            used, _ = _pieces(
                piece, sequence, length, num_pieces, capacity, plan_start, plan_end, plan_kind,
                stride_plan_sequence, PIECE, False,
            )  # fmt: skip
            last = tl.maximum(last, tl.where(used, piece, 0))
        count = tl.max(last, 0) + 1

    highest = tl.full([], LOWEST, tl.float32)
    for first in tl.range(0, count, BLOCK_P):
        piece = first + tl.arange(0, BLOCK_P)
        used, _ = _pieces(
            piece, sequence, length, num_pieces, capacity, plan_start, plan_end, plan_kind,
            stride_plan_sequence, PIECE, False,
        )  # fmt: skip
        maximum = tl.load(partial_max + first_offset + piece, mask=used, other=LOWEST)
        highest = tl.maximum(highest, tl.max(maximum, 0))

    total = tl.zeros([], tl.float32)
    video_total = tl.zeros([], tl.float32)
    video_highest = tl.full([], float("-inf"), tl.float32)
    accumulator = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(0, count, BLOCK_P):
        piece = first + tl.arange(0, BLOCK_P)
        used, is_video = _pieces(
            piece, sequence, length, num_pieces, capacity, plan_start, plan_end, plan_kind,
            stride_plan_sequence, PIECE, SCORES,
        )  # fmt: skip
        offset = first_offset + piece
        maximum = tl.load(partial_max + offset, mask=used, other=LOWEST)
        share = tl.math.exp2(maximum - highest)
        weight = share * tl.load(partial_sum + offset, mask=used, other=0.0)
        total += tl.sum(weight, 0)
        if SCORES:
            if PIECE > 0:
                video_weight = share * tl.load(partial_video_sum + offset, mask=used, other=0.0)
                video_max = tl.load(partial_video_max + offset, mask=used, other=float("-inf"))
            else:
                video_weight = tl.where(is_video, weight, 0.0)
                video_max = tl.where(is_video, maximum, float("-inf"))
            video_total += tl.sum(video_weight, 0)
            video_highest = tl.maximum(video_highest, tl.max(video_max, 0))
        part = tl.load(
            partial_out + offset[:, None] * HEAD_DIM + dim[None, :],
            mask=used[:, None] & (dim[None, :] < HEAD_DIM),
            other=0.0,
        )
        accumulator += tl.sum(share[:, None] * part, 0)

    # A row that attends to nothing: total 0, and -inf, 0, 0 and 0 come out.
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    result = accumulator * inverse
    if V_SCALED:
        result *= tl.load(v_scale + row // rows_per_head)
    tl.store(out + row * HEAD_DIM + dim, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
    tl.store(lse + row, (highest + tl.math.log2(total)) * 0.6931471805599453)
    if SCORES:
        tl.store(visual_mass + row, video_total * inverse)
        tl.store(visual_peak + row, tl.math.exp2(video_highest - highest) * inverse)


@triton.jit
def _pieces(
    piece,
    sequence,
    length,
    num_pieces,
    capacity,
    plan_start,
    plan_end,
    plan_kind,
    stride_plan_sequence,
    PIECE: tl.constexpr,
    KINDS: tl.constexpr,
):
    """Which of the pieces attend_kernel has written, and which of them are video."""
    is_listed = (piece > 0) & (piece <= num_pieces)
    if PIECE > 0:
        start = (piece - 1) * PIECE
        end = start + PIECE
    else:
        offset = sequence * stride_plan_sequence + piece - 1
        start = tl.load(plan_start + offset, mask=is_listed, other=0)
        end = tl.load(plan_end + offset, mask=is_listed, other=0)
    is_tree = piece == 0
    start = tl.where(is_tree, length, start)
    end = tl.where(is_tree, capacity, tl.minimum(end, length))
    used = (is_listed | is_tree) & (start < end)
    is_video = used
    if KINDS and PIECE == 0:
        is_video = used & (tl.load(plan_kind + offset, mask=is_listed, other=0) == 1)
    return used, is_video
