"""Phase 3, accept: logits, relevance and policy give the accepted slots and the bonus token."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec import ops
from lvspec.phases.sampling import Sampler, draw, draw_coupled
from lvspec.phases.slots import Draft
from lvspec.phases.verify import Verification
from lvspec.policy import AcceptancePolicy
from lvspec.reference.kinds import LOOSE, SHIFT


def accept(
    verification: Verification,
    draft: Draft,
    policy: AcceptancePolicy,
    regret_used: Tensor,
    workspace: Tensor | None = None,
    sampler: Sampler | None = None,
    is_strict: Tensor | None = None,
) -> tuple[ops.Acceptance, ops.LogitStats]:
    """Apply the policy to a verified draft.

    With a sampler the token that the target wants at a row is a sample of the row instead of its
    best; everything else is as without one. So under a strict policy the output is distributed as
    the target's own samples: whatever the shape of the draft, a token stands only where it *is* the
    sample, and behind the last one the sample itself follows. Where the draft was sampled too, the
    sample is made to be the drafted token as often as the two distributions allow (rejection
    sampling). The numbers of a looser policy are those of the row from which is sampled: regret is
    what is lost against its best token, ranks count the sample first and the others behind it.

    Args:
        verification: The target's word on every slot.
        draft: What was verified.
        policy: What may be accepted, `eos_ids` included.
        regret_used: float32 `[B]`, nats spent so far.
        workspace: Scratch for the operations, see `lvspec.ops.workspace_size`.
        sampler: None: the target wants its best token.
        is_strict: bool `[B]`, sequences for which nothing but what the target wants is accepted,
            whatever the policy; None: none is.

    Returns:
        What stands, and the statistics with what the target wants in `top_ids[..., 0]`.
    """
    stats = ops.logit_stats(verification.logits, top_k=policy.needed_top_k, workspace=workspace)
    if sampler is not None:
        wanted = _samples(verification.logits, draft, sampler)
        stats = stats._replace(top_ids=_wanted_first(stats.top_ids, wanted, policy.top_k or 1))
    judged = stats
    if is_strict is not None:
        # No mismatch is ever accepted from a row whose sum is no number.
        judged = stats._replace(lse=stats.lse.masked_fill(is_strict[:, None], torch.nan))
    acceptance = ops.accept(
        verification.logits,
        draft.tokens,
        draft.shape.parents,
        draft.shape.num_slots,
        judged,
        verification.relevance,
        policy,
        regret_used=regret_used,
    )
    return acceptance, stats


def regrets(
    logits: Tensor, draft: Draft, stats: ops.LogitStats, acceptance: ops.Acceptance
) -> Tensor:
    """What each token of the accepted path costs, in nats: `[B, S]` in the dtype of `stats`.

    Aligned with `path`; 0 for the root, for exact tokens and behind the path.
    """
    slot = acceptance.path.clamp(min=0).long()
    token, row = draft.tokens.gather(1, slot), slot.roll(1, dims=1)
    own = logits.flatten(1).gather(1, row * logits.shape[2] + token)
    costs = stats.top_logits[..., 0].gather(1, row) - own.to(stats.lse.dtype)
    is_mismatch = (acceptance.kind == LOOSE) | (acceptance.kind == SHIFT)
    return costs.masked_fill(~is_mismatch, 0)


def _samples(logits: Tensor, draft: Draft, sampler: Sampler) -> Tensor:
    """int64 `[B, S]`: what the target wants at every row."""
    slots = draft.tokens.shape[1]
    draws, tests = sampler.draws[:, :slots], sampler.tests[:, :slots]
    if draft.logits is None:
        return draw(logits, draws)
    return draw_coupled(logits, draft.logits, draft.tokens, draft.shape.num_slots, tests, draws)


def _wanted_first(top_ids: Tensor, wanted: Tensor, top_k: int) -> Tensor:
    """`top_ids` with the wanted token in front; the first `top_k` are it and the best others.

    The best token takes the place of the wanted one, or of the last of the `top_k` if that was not
    among them. What the list is used for is a set, so the order behind the first does not matter.
    """
    is_wanted = top_ids[..., :top_k] == wanted[..., None]
    rank = is_wanted.int().argmax(-1).masked_fill(~is_wanted.any(-1), top_k - 1)
    ids = top_ids.scatter(-1, rank[..., None], top_ids[..., :1])
    ids[..., 0] = wanted.int()
    return ids
