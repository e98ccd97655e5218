"""accept: the best of all paths through the draft tree, one sequence a program.

Reads about `S * (60 + 4 * top_k)` bytes a sequence, of which 32 are the sector of a node's logit;
writes `5 S + 16`. A rule of exact matches reads tokens, parents and best ids only. Its cost is not
these bytes but the steps down the tree, one after the other. Grid: one program a sequence.
Specification: lvspec.reference.accept.

Everything a sequence has fits in the registers of one warp: vectors over slots, first of what every
node is, then of what became of the path that ends in it. That follows from its parent's, so a step
is a few gathers along the parents for all slots at once, and there are as many as the tree is deep,
or as it can be accepted. Sets of slots are the bits of an integer: the ancestors of a node, whose
order is that of the path, and the mismatches above it that still wait for their word.
"""

from __future__ import annotations

import torch

from lvspec.kernels import launch
from lvspec.kernels.accept.paths import accept_kernel

# One warp, whose gathers are shuffles and which has no one to wait for. Products are rounded before
# they are added, as in the specification: scores of paths that are equal there are equal here.
_LAUNCH = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}


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
    rule: torch.Tensor,
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
            rule=rule,
            path=path,
            num_accepted=num_accepted,
            bonus_id=bonus_id,
            kind=kind,
            regret=regret,
            num_rows=num_rows,
            vocabulary=vocabulary,
            kept=top_ids.shape[2],
            num_strict_ids=strict_ids.shape[1],
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
            strict_ids_stride_batch=strict_ids.stride(0),
            strict_ids_stride_id=strict_ids.stride(1),
            eos_ids_stride=eos_ids.stride(0),
            rule_stride_batch=rule.stride(0),
            rule_stride_column=rule.stride(1),
            HAS_RELEVANCE=relevance is not None,
            HAS_REGRET_USED=regret_used is not None,
            BLOCK_S=32 if num_rows <= 32 else 64,
            **_LAUNCH,
        )
    return path, num_accepted, bonus_id, kind, regret
