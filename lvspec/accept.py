"""Phase 3, accept: logits, relevance and policy give the accepted slots and the bonus token."""

from __future__ import annotations

from torch import Tensor

from lvspec import ops
from lvspec.draft import Draft
from lvspec.policy import AcceptancePolicy
from lvspec.verify import Verification


def accept(
    verification: Verification,
    draft: Draft,
    policy: AcceptancePolicy,
    regret_used: Tensor,
    workspace: Tensor | None = None,
) -> tuple[ops.Acceptance, ops.LogitStats]:
    """Apply the policy to a verified draft.

    Args:
        verification: The target's word on every slot.
        draft: What was verified.
        policy: What may be accepted, `eos_ids` included.
        regret_used: float32 `[B]`, nats spent so far.
        workspace: Scratch for the operations, see `lvspec.ops.workspace_size`.
    """
    stats = ops.logit_stats(verification.logits, top_k=policy.needed_top_k, workspace=workspace)
    acceptance = ops.accept(
        verification.logits,
        draft.tokens,
        draft.shape.parents,
        draft.shape.num_slots,
        stats,
        verification.relevance,
        policy,
        regret_used=regret_used,
    )
    return acceptance, stats
