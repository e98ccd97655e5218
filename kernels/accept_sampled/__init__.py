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

from lvspec.kernels import launch
from lvspec.kernels.accept_sampled.draw import draw_kernel, sum_residual_kernel
from lvspec.kernels.accept_sampled.rows import judge_slots_kernel, sum_blocks_kernel
from lvspec.kernels.workspace import SAMPLING_BLOCK

# A thread of the kernels over blocks holds 32 logits of a row: in bfloat16 4 loads of 16 bytes.
_LAUNCH = {"block_warps": 4, "draw_warps": 16, "num_stages": 1}

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
    shared = {
        "logits": logits,
        "draft_logits": draft_logits if has_draft else None,
        "num_slots": num_slots,
        "scale": scale,
        "num_rows": num_rows,
        "vocabulary": vocabulary,
        "draft_vocabulary": draft_vocabulary,
        "num_blocks": num_blocks,
        "logits_stride_batch": logits.stride(0),
        "logits_stride_slot": logits.stride(1),
        "logits_stride_token": logits.stride(2),
        "draft_stride_batch": draft_logits.stride(0) if has_draft else 0,
        "draft_stride_slot": draft_logits.stride(1) if has_draft else 0,
        "draft_stride_token": draft_logits.stride(2) if has_draft else 0,
        "num_slots_stride": num_slots.stride(0),
        "HAS_DRAFT": has_draft,
        "num_stages": _LAUNCH["num_stages"],
    }
    drafted = {
        "tokens": tokens,
        "tokens_stride_batch": tokens.stride(0),
        "tokens_stride_slot": tokens.stride(1),
    }
    target_blocks = {"block_max": block_max, "block_sum": block_sum}
    draft_blocks = {
        "draft_block_max": draft_block_max,
        "draft_block_sum": draft_block_sum,
        "num_draft_blocks": num_draft_blocks,
    }
    judged = {
        "row_max": row_max,
        "row_log_sum": row_log_sum,
        "draft_row_max": draft_row_max,
        "draft_row_log_sum": draft_row_log_sum,
        "verdict": verdict,
    }
    num_row_kinds = 2 * num_rows - 1 if has_draft else num_rows
    with launch.device_guard(logits):
        sum_blocks_kernel[(max(num_blocks, num_draft_blocks), num_row_kinds, batch_size)](
            **shared,
            **target_blocks,
            **draft_blocks,
            BLOCK=SAMPLING_BLOCK,
            num_warps=_LAUNCH["block_warps"],
        )
        judge_slots_kernel[(num_rows, batch_size)](
            **shared,
            **drafted,
            **target_blocks,
            **draft_blocks,
            **judged,
            uniforms=uniforms,
            uniforms_stride_batch=uniforms.stride(0),
            uniforms_stride_slot=uniforms.stride(1),
            BLOCKS=_BLOCKS,
            num_warps=1,
        )
        sum_residual_kernel[(num_blocks, batch_size)](
            **shared,
            **drafted,
            **judged,
            residual_sum=residual_sum,
            BLOCK=SAMPLING_BLOCK,
            BLOCK_S=_SLOTS,
            num_warps=_LAUNCH["block_warps"],
        )
        draw_kernel[(batch_size,)](
            **shared,
            **drafted,
            **target_blocks,
            **judged,
            uniforms=uniforms,
            uniforms_stride_batch=uniforms.stride(0),
            residual_sum=residual_sum,
            path=path,
            num_accepted=num_accepted,
            bonus_id=bonus_id,
            kind=kind,
            regret=regret,
            BLOCK=SAMPLING_BLOCK,
            BLOCKS=_BLOCKS,
            BLOCK_S=_SLOTS,
            num_warps=_LAUNCH["draw_warps"],
        )
    return path, num_accepted, bonus_id, kind, regret
