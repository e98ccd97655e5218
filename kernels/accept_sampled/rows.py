"""accept_sampled: speculative sampling of a chain, without a tensor of probabilities.

Four kernels: maximum and sum of every block of every row; per row their merger and the test of the
slot that it predicts; the sums of the residual weights, per block of the one row a sequence whose
token was rejected; and per sequence the path and the drawn token, found by block sums first and in
one block of weights then.

Reads the `n` rows of logits and `n - 1` rows of draft logits of every sequence once, a row of each
once more if a token was rejected, and a block of each again; writes `5 S + 16` bytes a sequence.
Partial results are 8 bytes a row and block and stay in L2. Grids: (blocks, 2 S - 1, B), (S, B),
(blocks, B) and (B). Specification: lvspec.reference.accept_sampled.

A row's bits depend on V, on the type and on whether rows begin at multiples of 16 bytes, not on B
or S: all blocks have one length, and so has every tile over which a sum is taken.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.workspace import SAMPLING_BLOCK

_INFINITY = tl.constexpr(float("inf"))
_NO_ID = tl.constexpr(0x7FFFFFFF)

# What the bonus token is drawn by.
_MAXIMUM = tl.constexpr(0)
_TARGET = tl.constexpr(1)
_RESIDUAL = tl.constexpr(2)


@triton.jit
def _load_block(logits_row, stride_token, ids, vocabulary):
    return tl.load(
        logits_row + ids.to(tl.int64) * stride_token, mask=ids < vocabulary, other=-_INFINITY
    ).to(tl.float32)


@triton.jit
def _power(values, highest, scale, shift):
    """`exp2((values - highest) * scale - shift)`, with the same bits in every kernel.

    So a block whose sum is positive has an id of positive weight when it is read again. The fma is
    explicit, since the compiler fuses here but not there, and nothing is left to fuse behind it.
    """
    return tl.exp2(tl.fma(values - highest, scale, -shift))


@triton.jit
def _sum_block(logits_row, stride_token, ids, vocabulary, scale, block_max, block_sum, place):
    """NaN is left out of the maximum and makes the sum NaN."""
    values = _load_block(logits_row, stride_token, ids, vocabulary)
    highest = tl.max(values, axis=0)
    highest = tl.where(highest == highest, highest, -_INFINITY)
    weights = _power(values, tl.where(tl.abs(highest) < _INFINITY, highest, 0.0), scale, 0.0)
    tl.store(block_max + place, highest)
    tl.store(block_sum + place, tl.sum(weights, axis=0))


@triton.jit
def _merge_blocks(block_max, block_sum, row, num_blocks, scale, BLOCKS: tl.constexpr):
    """Maximum of a row, and log2 of the sum of its weights: NaN if the row is irregular."""
    lane = tl.arange(0, BLOCKS)
    places = row * num_blocks + lane
    maxima = tl.full((BLOCKS,), float("-inf"), tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        here = tl.load(block_max + places + start, mask=start + lane < num_blocks, other=-_INFINITY)
        maxima = tl.maximum(maxima, here)
    highest = tl.max(maxima, axis=0)
    is_finite = tl.abs(highest) < _INFINITY
    level = tl.where(is_finite, highest, 0.0)
    total = tl.zeros((BLOCKS,), tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        in_row = start + lane < num_blocks
        here = tl.load(block_max + places + start, mask=in_row, other=-_INFINITY)
        sums = tl.load(block_sum + places + start, mask=in_row, other=0.0)
        total += sums * _power(here, level, scale, 0.0)
    log_total = tl.log2(tl.sum(total, axis=0))
    return highest, tl.where(is_finite, log_total, float("nan"))


@triton.jit
def _probability(logits_row, stride_token, token, vocabulary, highest, log_total, scale):
    is_inside = (token >= 0) & (token < vocabulary)
    own = tl.load(logits_row + token * stride_token, mask=is_inside, other=-_INFINITY)
    return _power(own.to(tl.float32), highest, scale, log_total)


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
    values = _load_block(logits_row, stride_token, ids, vocabulary)
    weights = _power(values, highest, scale, log_total)
    if HAS_DRAFT:
        # An id past the target's vocabulary has weight 0 already.
        values = _load_block(draft_row, draft_stride_token, ids, draft_vocabulary)
        weights = tl.maximum(weights - _power(values, draft_highest, scale, draft_log_total), 0.0)
    else:
        token = tl.where((token >= 0) & (token < vocabulary), token, -1).to(tl.int32)
        weights = tl.where(ids == token, 0.0, weights)
    return weights


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
    in_use = tl.load(num_slots + sequence * num_slots_stride)
    in_use = tl.minimum(tl.maximum(in_use, 1), num_rows)
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


_UNSPECIALIZED = [
    "num_rows",
    "num_blocks",
    "num_draft_blocks",
    "tokens_stride_batch",
    "tokens_stride_slot",
    "uniforms_stride_batch",
    "uniforms_stride_slot",
    "num_slots_stride",
]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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
    in_use = tl.load(num_slots + sequence * num_slots_stride)
    in_use = tl.minimum(tl.maximum(in_use, 1), num_rows)
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


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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
    in_use = tl.load(num_slots + sequence * num_slots_stride)
    in_use = tl.minimum(tl.maximum(in_use, 1), num_rows)
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
    sums *= _power(maxima, level, scale, 0.0)
    marks = tl.where(maxima == highest, 1.0, 0.0)
    weights = tl.where(mode == _RESIDUAL, left, tl.where(mode == _TARGET, sums, marks))
    return weights.to(tl.float64)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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
    in_use = tl.load(num_slots + sequence * num_slots_stride)
    in_use = tl.minimum(tl.maximum(in_use, 1), num_rows)
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
        values = _load_block(logits_row, logits_stride_token, ids, vocabulary)
        ranked = tl.where(values == values, values, -_INFINITY)
        marks = tl.where(ranked == highest, 1.0, 0.0)
        weights = tl.where(mode == _TARGET, _power(values, level, scale, 0.0), marks)
    is_behind = (weights > 0.0) & (tl.cumsum(weights, axis=0) > left.to(tl.float32))
    token = tl.min(tl.where(is_behind, ids, _NO_ID), axis=0)
    fallback = tl.max(tl.where(weights > 0.0, ids, 0), axis=0)
    tl.store(bonus_id + sequence, tl.where(token == _NO_ID, fallback, token).to(tl.int64))


# A thread of the kernels over blocks holds 32 logits of a row: in bfloat16 4 loads of 16 bytes.
_LAUNCH = {
    "sm80": {"block_warps": 4, "draw_warps": 16, "num_stages": 1},
    "sm90": {"block_warps": 4, "draw_warps": 16, "num_stages": 1},
    "sm100": {"block_warps": 4, "draw_warps": 16, "num_stages": 1},
}

_SLOTS = 64
_BLOCKS = 64
"""Partial results that are looked at together: all of a vocabulary of up to 262,144."""

_LIMITS = torch.finfo(torch.float32)


def accept_sampled(
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    num_slots: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float,
    workspace: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Launch `lvspec.ops.accept_sampled`."""
    batch_size, num_rows, vocabulary = logits.shape
    device = logits.device
    path = torch.empty((batch_size, num_rows), dtype=torch.int32, device=device)
    num_accepted = torch.empty(batch_size, dtype=torch.int32, device=device)
    bonus_id = torch.empty(batch_size, dtype=torch.int64, device=device)
    kind = torch.empty((batch_size, num_rows), dtype=torch.uint8, device=device)
    regret = torch.empty(batch_size, dtype=torch.float32, device=device)
    if not batch_size:
        return path, num_accepted, bonus_id, kind, regret

    has_draft = draft_logits is not None and num_rows > 1
    draft_vocabulary = draft_logits.shape[2] if has_draft else 0
    num_blocks = triton.cdiv(vocabulary, SAMPLING_BLOCK)
    num_draft_blocks = triton.cdiv(draft_vocabulary, SAMPLING_BLOCK)
    parts = [
        ((batch_size, num_rows, blocks), torch.float32)
        for blocks in (num_blocks, num_blocks, num_draft_blocks, num_draft_blocks)
    ]
    parts += [((batch_size, num_rows), torch.float32)] * 4
    parts += [((batch_size, num_rows), torch.int32), ((batch_size, num_blocks), torch.float32)]
    scratch = launch.carve(workspace, device, *parts)
    block_max, block_sum, draft_block_max, draft_block_sum = scratch[:4]
    row_max, row_log_sum, draft_row_max, draft_row_log_sum, verdict, residual_sum = scratch[4:]

    # exp(x / temperature) as a power of 2. 0 * inf and inf * 0 would be NaN.
    scale = min(max(1 / (temperature * math.log(2)), _LIMITS.tiny), _LIMITS.max)
    strides = {
        "logits_stride_batch": logits.stride(0),
        "logits_stride_slot": logits.stride(1),
        "logits_stride_token": logits.stride(2),
        "draft_stride_batch": draft_logits.stride(0) if has_draft else 0,
        "draft_stride_slot": draft_logits.stride(1) if has_draft else 0,
        "draft_stride_token": draft_logits.stride(2) if has_draft else 0,
        "num_slots_stride": num_slots.stride(0),
    }
    token_strides = {
        "tokens_stride_batch": tokens.stride(0),
        "tokens_stride_slot": tokens.stride(1),
    }
    table = _LAUNCH[launch.device_class(device)]
    num_row_kinds = 2 * num_rows - 1 if has_draft else num_rows
    with launch.device_guard(logits):
        sum_blocks_kernel[(max(num_blocks, num_draft_blocks), num_row_kinds, batch_size)](
            logits=logits,
            draft_logits=draft_logits if has_draft else None,
            num_slots=num_slots,
            scale=scale,
            block_max=block_max,
            block_sum=block_sum,
            draft_block_max=draft_block_max,
            draft_block_sum=draft_block_sum,
            num_rows=num_rows,
            vocabulary=vocabulary,
            draft_vocabulary=draft_vocabulary,
            num_blocks=num_blocks,
            num_draft_blocks=num_draft_blocks,
            **strides,
            HAS_DRAFT=has_draft,
            BLOCK=SAMPLING_BLOCK,
            num_warps=table["block_warps"],
            num_stages=table["num_stages"],
        )
        judge_slots_kernel[(num_rows, batch_size)](
            logits=logits,
            draft_logits=draft_logits if has_draft else None,
            tokens=tokens,
            num_slots=num_slots,
            uniforms=uniforms,
            scale=scale,
            block_max=block_max,
            block_sum=block_sum,
            draft_block_max=draft_block_max,
            draft_block_sum=draft_block_sum,
            row_max=row_max,
            row_log_sum=row_log_sum,
            draft_row_max=draft_row_max,
            draft_row_log_sum=draft_row_log_sum,
            verdict=verdict,
            num_rows=num_rows,
            vocabulary=vocabulary,
            draft_vocabulary=draft_vocabulary,
            num_blocks=num_blocks,
            num_draft_blocks=num_draft_blocks,
            **strides,
            **token_strides,
            uniforms_stride_batch=uniforms.stride(0),
            uniforms_stride_slot=uniforms.stride(1),
            HAS_DRAFT=has_draft,
            BLOCKS=_BLOCKS,
            num_warps=1,
            num_stages=table["num_stages"],
        )
        sum_residual_kernel[(num_blocks, batch_size)](
            logits=logits,
            draft_logits=draft_logits if has_draft else None,
            tokens=tokens,
            num_slots=num_slots,
            scale=scale,
            row_max=row_max,
            row_log_sum=row_log_sum,
            draft_row_max=draft_row_max,
            draft_row_log_sum=draft_row_log_sum,
            verdict=verdict,
            residual_sum=residual_sum,
            num_rows=num_rows,
            vocabulary=vocabulary,
            draft_vocabulary=draft_vocabulary,
            num_blocks=num_blocks,
            **strides,
            **token_strides,
            HAS_DRAFT=has_draft,
            BLOCK=SAMPLING_BLOCK,
            BLOCK_S=_SLOTS,
            num_warps=table["block_warps"],
            num_stages=table["num_stages"],
        )
        draw_kernel[(batch_size,)](
            logits=logits,
            draft_logits=draft_logits if has_draft else None,
            tokens=tokens,
            num_slots=num_slots,
            uniforms=uniforms,
            scale=scale,
            block_max=block_max,
            block_sum=block_sum,
            row_max=row_max,
            row_log_sum=row_log_sum,
            draft_row_max=draft_row_max,
            draft_row_log_sum=draft_row_log_sum,
            verdict=verdict,
            residual_sum=residual_sum,
            path=path,
            num_accepted=num_accepted,
            bonus_id=bonus_id,
            kind=kind,
            regret=regret,
            num_rows=num_rows,
            vocabulary=vocabulary,
            draft_vocabulary=draft_vocabulary,
            num_blocks=num_blocks,
            **strides,
            **token_strides,
            uniforms_stride_batch=uniforms.stride(0),
            HAS_DRAFT=has_draft,
            BLOCK=SAMPLING_BLOCK,
            BLOCKS=_BLOCKS,
            BLOCK_S=_SLOTS,
            num_warps=table["draw_warps"],
            num_stages=table["num_stages"],
        )
    return path, num_accepted, bonus_id, kind, regret
