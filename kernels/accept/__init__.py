"""accept: walk down the draft tree and cut the path, one sequence a program.

Reads about `S * (60 + 4 * top_k)` bytes a sequence, of which 32 are the sector of a node's logit;
writes `5 S + 16`. Its cost is not these bytes but the steps of the walk, one after the other. Grid:
one program a sequence. Specification: lvspec.reference.accept.

Everything a sequence has fits in the registers of one warp: vectors over slots (what a node is) and
vectors over indices of the path (what became of it), with `slot` for the positions of both. A step
to an exact child is one integer minimum over the warp, a step to a mismatch a few; no step waits
for memory. What a mismatch needs in order to stand is written down as the least length of the path
with which it does, so that the cut is a search for the first mismatch that needs more.
"""

from __future__ import annotations

import torch

from lvspec.kernels import launch
from lvspec.kernels.accept.walk import accept_kernel

# One warp, whose minima are single instructions and which has no one to wait for.
_LAUNCH = {"num_warps": 1, "num_stages": 1}


def accept(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_slots: torch.Tensor,
    top_ids: torch.Tensor,
    top_logits: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    relevance: torch.Tensor | None,
    regret_used: torch.Tensor | None,
    strict_ids: torch.Tensor,
    eos_ids: torch.Tensor,
    anchor_threshold: float,
    max_regret: float,
    top_k: int,
    min_log_prob: float,
    typical_log_eps: float,
    typical_log_delta: float,
    min_entropy: float,
    entropy_top: int,
    shift_window: int,
    window: int,
    max_run: int,
    regret_budget: float,
) -> tuple[torch.Tensor, ...]:
    """Launch `lvspec.ops.accept`."""
    batch_size, num_rows, vocabulary = logits.shape
    device = logits.device
    path = torch.empty((batch_size, num_rows), dtype=torch.int32, device=device)
    num_accepted = torch.empty(batch_size, dtype=torch.int32, device=device)
    bonus_id = torch.empty(batch_size, dtype=torch.int64, device=device)
    kind = torch.empty((batch_size, num_rows), dtype=torch.uint8, device=device)
    regret = torch.empty(batch_size, dtype=torch.float32, device=device)
    if not batch_size:
        return path, num_accepted, bonus_id, kind, regret

    with launch.device_guard(logits):
        accept_kernel[(batch_size,)](
            logits=logits,
            tokens=tokens,
            parents=parents,
            num_slots=num_slots,
            top_ids=top_ids,
            top_logits=top_logits,
            lse=lse,
            entropy=entropy,
            relevance=relevance,
            regret_used=regret_used,
            strict_ids=strict_ids,
            eos_ids=eos_ids,
            anchor_threshold=anchor_threshold,
            max_regret=max_regret,
            top_k=top_k,
            min_log_prob=min_log_prob,
            typical_log_eps=typical_log_eps,
            typical_log_delta=typical_log_delta,
            min_entropy=min_entropy,
            entropy_top=entropy_top,
            shift_window=shift_window,
            window=window,
            max_run=max_run,
            regret_budget=regret_budget,
            path=path,
            num_accepted=num_accepted,
            bonus_id=bonus_id,
            kind=kind,
            regret=regret,
            num_rows=num_rows,
            vocabulary=vocabulary,
            num_strict_ids=strict_ids.shape[0],
            num_eos_ids=eos_ids.shape[0],
            logits_stride_batch=logits.stride(0),
            logits_stride_slot=logits.stride(1),
            logits_stride_token=logits.stride(2),
            tokens_stride_batch=tokens.stride(0),
            tokens_stride_slot=tokens.stride(1),
            parents_stride_batch=parents.stride(0),
            parents_stride_slot=parents.stride(1),
            num_slots_stride=num_slots.stride(0),
            top_ids_stride_batch=top_ids.stride(0),
            top_ids_stride_slot=top_ids.stride(1),
            top_ids_stride_rank=top_ids.stride(2),
            top_logits_stride_batch=top_logits.stride(0),
            top_logits_stride_slot=top_logits.stride(1),
            top_logits_stride_rank=top_logits.stride(2),
            lse_stride_batch=lse.stride(0),
            lse_stride_slot=lse.stride(1),
            entropy_stride_batch=entropy.stride(0),
            entropy_stride_slot=entropy.stride(1),
            relevance_stride_batch=relevance.stride(0) if relevance is not None else 0,
            relevance_stride_slot=relevance.stride(1) if relevance is not None else 0,
            regret_used_stride=regret_used.stride(0) if regret_used is not None else 0,
            HAS_RELEVANCE=relevance is not None,
            HAS_REGRET_USED=regret_used is not None,
            BLOCK_S=32 if num_rows <= 32 else 64,
            **_LAUNCH,
        )
    return path, num_accepted, bonus_id, kind, regret
