"""The rows of target and draft: maximum and sum of each, and the test of the slot it predicts."""

from __future__ import annotations

import triton
import triton.language as tl

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def slots_in_use(num_slots, num_slots_stride, sequence, num_rows):
    in_use = tl.load(num_slots + sequence * num_slots_stride)
    return tl.minimum(tl.maximum(in_use, 1), num_rows)


@triton.jit
def load_block(logits_row, stride_token, ids, vocabulary):
    return tl.load(
        logits_row + ids.to(tl.int64) * stride_token, mask=ids < vocabulary, other=-_INFINITY
    ).to(tl.float32)


@triton.jit
def power(values, highest, scale, shift):
    """`exp2((values - highest) * scale - shift)`, with the same bits in every kernel.

    So a block whose sum is positive has an id of positive weight when it is read again. The fma is
    explicit, since the compiler fuses here but not there, and nothing is left to fuse behind it.
    """
    return tl.exp2(tl.fma(values - highest, scale, -shift))


@triton.jit
def _sum_block(logits_row, stride_token, ids, vocabulary, scale, block_max, block_sum, offset):
    """NaN is left out of the maximum and makes the sum NaN."""
    values = load_block(logits_row, stride_token, ids, vocabulary)
    highest = tl.max(values, axis=0)
    highest = tl.where(highest == highest, highest, -_INFINITY)
    weights = power(values, tl.where(tl.abs(highest) < _INFINITY, highest, 0.0), scale, 0.0)
    tl.store(block_max + offset, highest)
    tl.store(block_sum + offset, tl.sum(weights, axis=0))


@triton.jit
def _merge_blocks(block_max, block_sum, row, num_blocks, scale, BLOCKS: tl.constexpr):
    """Maximum of a row, and log2 of the sum of its weights: NaN if the row is irregular."""
    lane = tl.arange(0, BLOCKS)
    offsets = row * num_blocks + lane
    maxima = tl.full((BLOCKS,), float("-inf"), tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        in_row = start + lane < num_blocks
        here = tl.load(block_max + offsets + start, mask=in_row, other=-_INFINITY)
        maxima = tl.maximum(maxima, here)
    highest = tl.max(maxima, axis=0)
    is_finite = tl.abs(highest) < _INFINITY
    level = tl.where(is_finite, highest, 0.0)
    total = tl.zeros((BLOCKS,), tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        in_row = start + lane < num_blocks
        here = tl.load(block_max + offsets + start, mask=in_row, other=-_INFINITY)
        sums = tl.load(block_sum + offsets + start, mask=in_row, other=0.0)
        total += sums * power(here, level, scale, 0.0)
    log_total = tl.log2(tl.sum(total, axis=0))
    return highest, tl.where(is_finite, log_total, float("nan"))


@triton.jit
def _probability(logits_row, stride_token, token, vocabulary, highest, log_total, scale):
    is_inside = (token >= 0) & (token < vocabulary)
    own = tl.load(logits_row + token * stride_token, mask=is_inside, other=-_INFINITY)
    return power(own.to(tl.float32), highest, scale, log_total)


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_draft_blocks", "num_slots_stride"])
def sum_blocks_kernel(
    # inputs
    logits,
    draft_logits,
    num_slots,
    scale,
    # outputs
    block_max,
    block_sum,
    draft_block_max,
    draft_block_sum,
    # sizes
    num_rows,
    vocabulary,
    draft_vocabulary,
    num_blocks,
    num_draft_blocks,
    # strides
    logits_stride_batch,
    logits_stride_slot,
    logits_stride_token,
    draft_stride_batch,
    draft_stride_slot,
    draft_stride_token,
    num_slots_stride,
    # flags
    HAS_DRAFT: tl.constexpr,
    # tiles
    BLOCK: tl.constexpr,
):
    """One block of a row of the target, or behind these of the draft."""
    block = tl.program_id(0)
    slot = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    in_use = slots_in_use(num_slots, num_slots_stride, sequence, num_rows)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    if slot < num_rows:
        if (slot < in_use) & (block < num_blocks):
            _sum_block(
                logits + sequence * logits_stride_batch + slot * logits_stride_slot,
                logits_stride_token,
                ids,
                vocabulary,
                scale,
                block_max,
                block_sum,
                (sequence * num_rows + slot) * num_blocks + block,
            )
    elif HAS_DRAFT:
        slot -= num_rows
        if (slot + 1 < in_use) & (block < num_draft_blocks):
            _sum_block(
                draft_logits + sequence * draft_stride_batch + slot * draft_stride_slot,
                draft_stride_token,
                ids,
                draft_vocabulary,
                scale,
                draft_block_max,
                draft_block_sum,
                (sequence * num_rows + slot) * num_draft_blocks + block,
            )


UNSPECIALIZED = [
    "num_rows",
    "num_blocks",
    "num_draft_blocks",
    "tokens_stride_batch",
    "tokens_stride_slot",
    "uniforms_stride_batch",
    "uniforms_stride_slot",
    "num_slots_stride",
]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def judge_slots_kernel(
    # inputs
    logits,
    draft_logits,
    tokens,
    num_slots,
    uniforms,
    scale,
    block_max,
    block_sum,
    draft_block_max,
    draft_block_sum,
    # outputs
    row_max,
    row_log_sum,
    draft_row_max,
    draft_row_log_sum,
    verdict,
    # sizes
    num_rows,
    vocabulary,
    draft_vocabulary,
    num_blocks,
    num_draft_blocks,
    # strides
    logits_stride_batch,
    logits_stride_slot,
    logits_stride_token,
    draft_stride_batch,
    draft_stride_slot,
    draft_stride_token,
    tokens_stride_batch,
    tokens_stride_slot,
    num_slots_stride,
    uniforms_stride_batch,
    uniforms_stride_slot,
    # flags
    HAS_DRAFT: tl.constexpr,
    # tiles
    BLOCKS: tl.constexpr,
):
    """One row of target and draft, and whether the slot behind it is accepted."""
    slot = tl.program_id(0).to(tl.int64)
    sequence = tl.program_id(1).to(tl.int64)
    in_use = slots_in_use(num_slots, num_slots_stride, sequence, num_rows)
    row = sequence * num_rows + slot
    if slot < in_use:
        highest, log_total = _merge_blocks(block_max, block_sum, row, num_blocks, scale, BLOCKS)
        tl.store(row_max + row, highest)
        tl.store(row_log_sum + row, log_total)
        if slot + 1 < in_use:
            token = tl.load(
                tokens + sequence * tokens_stride_batch + (slot + 1) * tokens_stride_slot
            )
            uniform = tl.load(
                uniforms + sequence * uniforms_stride_batch + (slot + 1) * uniforms_stride_slot
            )
            own = _probability(
                logits + sequence * logits_stride_batch + slot * logits_stride_slot,
                logits_stride_token,
                token,
                vocabulary,
                highest,
                log_total,
                scale,
            )
            if HAS_DRAFT:
                draft_highest, draft_log_total = _merge_blocks(
                    draft_block_max, draft_block_sum, row, num_draft_blocks, scale, BLOCKS
                )
                tl.store(draft_row_max + row, draft_highest)
                tl.store(draft_row_log_sum + row, draft_log_total)
                uniform *= _probability(
                    draft_logits + sequence * draft_stride_batch + slot * draft_stride_slot,
                    draft_stride_token,
                    token,
                    draft_vocabulary,
                    draft_highest,
                    draft_log_total,
                    scale,
                )
            # False if a row is irregular, for then one of the two is NaN.
            tl.store(verdict + row, (uniform < own).to(tl.int32))
