"""The path, and the bonus token: drawn by the residual, or by the target, or the maximum."""

from __future__ import annotations

import triton
import triton.language as tl

from lvspec.kernels.accept_sampled.rows import UNSPECIALIZED, load_block, power, slots_in_use

_INFINITY = tl.constexpr(float("inf"))
_NO_ID = tl.constexpr(0x7FFFFFFF)

# What the bonus token is drawn by.
_MAXIMUM = tl.constexpr(0)
_TARGET = tl.constexpr(1)
_RESIDUAL = tl.constexpr(2)


@triton.jit
def _last_of_path(verdict, sequence, in_use, num_rows, BLOCK_S: tl.constexpr):
    """The first slot whose successor was not accepted, or has none."""
    slot = tl.arange(0, BLOCK_S)
    is_accepted = tl.load(verdict + sequence * num_rows + slot, mask=slot + 1 < in_use, other=0)
    return tl.min(tl.where(is_accepted != 0, BLOCK_S, slot), axis=0)


@triton.jit
def _residual_weights(
    logits_row,
    draft_row,
    token,
    ids,
    highest,
    log_total,
    draft_highest,
    draft_log_total,
    scale,
    vocabulary,
    draft_vocabulary,
    stride_token,
    draft_stride_token,
    HAS_DRAFT: tl.constexpr,
):
    values = load_block(logits_row, stride_token, ids, vocabulary)
    weights = power(values, highest, scale, log_total)
    if HAS_DRAFT:
        # An id past the target's vocabulary has weight 0 already.
        values = load_block(draft_row, draft_stride_token, ids, draft_vocabulary)
        weights = tl.maximum(weights - power(values, draft_highest, scale, draft_log_total), 0.0)
    else:
        token = tl.where((token >= 0) & (token < vocabulary), token, -1).to(tl.int32)
        weights = tl.where(ids == token, 0.0, weights)
    return weights


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sum_residual_kernel(
    # inputs
    logits,
    draft_logits,
    tokens,
    num_slots,
    scale,
    row_max,
    row_log_sum,
    draft_row_max,
    draft_row_log_sum,
    verdict,
    # outputs
    residual_sum,
    # sizes
    num_rows,
    vocabulary,
    draft_vocabulary,
    num_blocks,
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
    # flags
    HAS_DRAFT: tl.constexpr,
    # tiles
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One block of the row whose token was rejected; nothing where none was."""
    block = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    in_use = slots_in_use(num_slots, num_slots_stride, sequence, num_rows)
    last = _last_of_path(verdict, sequence, in_use, num_rows, BLOCK_S).to(tl.int64)
    if last + 1 < in_use:
        row = sequence * num_rows + last
        draft_highest = 0.0
        draft_log_total = 0.0
        draft_row = logits
        if HAS_DRAFT:
            draft_highest = tl.load(draft_row_max + row)
            draft_log_total = tl.load(draft_row_log_sum + row)
            draft_row = draft_logits + sequence * draft_stride_batch + last * draft_stride_slot
        weights = _residual_weights(
            logits + sequence * logits_stride_batch + last * logits_stride_slot,
            draft_row,
            tl.load(tokens + sequence * tokens_stride_batch + (last + 1) * tokens_stride_slot),
            block * BLOCK + tl.arange(0, BLOCK),
            tl.load(row_max + row),
            tl.load(row_log_sum + row),
            draft_highest,
            draft_log_total,
            scale,
            vocabulary,
            draft_vocabulary,
            logits_stride_token,
            draft_stride_token,
            HAS_DRAFT,
        )
        tl.store(residual_sum + sequence * num_blocks + block, tl.sum(weights, axis=0))


@triton.jit
def _block_weights(
    block_max,
    block_sum,
    residual_sum,
    sequence,
    row,
    blocks,
    num_blocks,
    highest,
    level,
    scale,
    mode,
):
    """What each block weighs in the draw; by the maximum, whether it has it.

    If that is -inf blocks past the last have it too, but the first one is drawn.
    """
    exists = blocks < num_blocks
    maxima = tl.load(block_max + row * num_blocks + blocks, mask=exists, other=-_INFINITY)
    sums = tl.load(block_sum + row * num_blocks + blocks, mask=exists, other=0.0)
    num_left = tl.where(mode == _RESIDUAL, num_blocks, 0)
    left = tl.load(residual_sum + sequence * num_blocks + blocks, mask=blocks < num_left, other=0.0)
    sums *= power(maxima, level, scale, 0.0)
    marks = tl.where(maxima == highest, 1.0, 0.0)
    weights = tl.where(mode == _RESIDUAL, left, tl.where(mode == _TARGET, sums, marks))
    return weights.to(tl.float64)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def draw_kernel(
    # inputs
    logits,
    draft_logits,
    tokens,
    num_slots,
    uniforms,
    scale,
    block_max,
    block_sum,
    row_max,
    row_log_sum,
    draft_row_max,
    draft_row_log_sum,
    verdict,
    residual_sum,
    # outputs
    path,
    num_accepted,
    bonus_id,
    kind,
    regret,
    # sizes
    num_rows,
    vocabulary,
    draft_vocabulary,
    num_blocks,
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
    # flags
    HAS_DRAFT: tl.constexpr,
    # tiles
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One sequence: its path, and the bonus token."""
    sequence = tl.program_id(0).to(tl.int64)
    in_use = slots_in_use(num_slots, num_slots_stride, sequence, num_rows)
    last = _last_of_path(verdict, sequence, in_use, num_rows, BLOCK_S)
    slot = tl.arange(0, BLOCK_S)
    is_path = slot <= last
    exists = slot < num_rows
    tl.store(path + sequence * num_rows + slot, tl.where(is_path, slot, -1), mask=exists)
    kinds = tl.where(is_path, 0, 255).to(tl.uint8)
    tl.store(kind + sequence * num_rows + slot, kinds, mask=exists)
    tl.store(num_accepted + sequence, last)
    tl.store(regret + sequence, 0.0)

    last_slot = last.to(tl.int64)
    row = sequence * num_rows + last_slot
    highest = tl.load(row_max + row)
    level = tl.where(tl.abs(highest) < _INFINITY, highest, 0.0)
    log_total = tl.load(row_log_sum + row)
    is_rejected = last + 1 < in_use
    mode = tl.where(log_total == log_total, tl.where(is_rejected, _RESIDUAL, _TARGET), _MAXIMUM)
    draft_highest = 0.0
    draft_log_total = 0.0
    draft_row = logits
    if HAS_DRAFT:
        draft_highest = tl.load(draft_row_max + row, mask=is_rejected, other=0.0)
        draft_log_total = tl.load(draft_row_log_sum + row, mask=is_rejected, other=0.0)
        if draft_log_total != draft_log_total:
            mode = tl.minimum(mode, _TARGET)
        draft_row = draft_logits + sequence * draft_stride_batch + last_slot * draft_stride_slot

    lane = tl.arange(0, BLOCKS)
    if mode == _RESIDUAL:
        anything = tl.zeros((BLOCKS,), tl.float32)
        for start in range(0, num_blocks, BLOCKS):
            anything += tl.load(
                residual_sum + sequence * num_blocks + start + lane,
                mask=start + lane < num_blocks,
                other=0.0,
            )
        if tl.max(anything, axis=0) == 0.0:
            mode = tl.minimum(mode, _TARGET)

    totals = tl.zeros((BLOCKS,), tl.float64)
    for start in range(0, num_blocks, BLOCKS):
        totals += _block_weights(
            block_max,
            block_sum,
            residual_sum,
            sequence,
            row,
            start + lane,
            num_blocks,
            highest,
            level,
            scale,
            mode,
        )
    uniform = tl.load(uniforms + sequence * uniforms_stride_batch).to(tl.float64)
    threshold = tl.where(mode == _MAXIMUM, 0.0, uniform) * tl.sum(totals, axis=0)

    # The first block at which the running sum exceeds the threshold. If there is none, the last of
    # any weight, and in it no id will exceed what is left of the threshold either.
    chosen = tl.full((), _NO_ID, tl.int32)
    last_block = tl.full((), 0, tl.int32)
    left = tl.full((), float("inf"), tl.float64)
    before = tl.full((), 0.0, tl.float64)
    for start in range(0, num_blocks, BLOCKS):
        weights = _block_weights(
            block_max,
            block_sum,
            residual_sum,
            sequence,
            row,
            start + lane,
            num_blocks,
            highest,
            level,
            scale,
            mode,
        )
        sums = before + tl.cumsum(weights, axis=0)
        is_behind = (weights > 0.0) & (sums > threshold)
        first = tl.min(tl.where(is_behind, start + lane, _NO_ID), axis=0)
        passed = tl.sum(tl.where(start + lane == first, sums - weights, 0.0), axis=0)
        left = tl.where(first < chosen, threshold - passed, left)
        chosen = tl.minimum(chosen, first)
        last_block = tl.maximum(
            last_block, tl.max(tl.where(weights > 0.0, start + lane, 0), axis=0)
        )
        before += tl.sum(weights, axis=0)
    chosen = tl.where(chosen == _NO_ID, last_block, chosen)

    ids = chosen * BLOCK + tl.arange(0, BLOCK)
    logits_row = logits + sequence * logits_stride_batch + last_slot * logits_stride_slot
    if mode == _RESIDUAL:
        weights = _residual_weights(
            logits_row,
            draft_row,
            tl.load(tokens + sequence * tokens_stride_batch + (last_slot + 1) * tokens_stride_slot),
            ids,
            highest,
            log_total,
            draft_highest,
            draft_log_total,
            scale,
            vocabulary,
            draft_vocabulary,
            logits_stride_token,
            draft_stride_token,
            HAS_DRAFT,
        )
    else:
        values = load_block(logits_row, logits_stride_token, ids, vocabulary)
        ranked = tl.where(values == values, values, -_INFINITY)
        marks = tl.where(ranked == highest, 1.0, 0.0)
        weights = tl.where(mode == _TARGET, power(values, level, scale, 0.0), marks)
    is_behind = (weights > 0.0) & (tl.cumsum(weights, axis=0) > left.to(tl.float32))
    token = tl.min(tl.where(is_behind, ids, _NO_ID), axis=0)
    fallback = tl.max(tl.where(weights > 0.0, ids, 0), axis=0)
    tl.store(bonus_id + sequence, tl.where(token == _NO_ID, fallback, token).to(tl.int64))
