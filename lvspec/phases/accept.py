"""Phase 3, accept: logits, relevance and policy give the accepted slots and the bonus token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lvspec import ops
from lvspec.phases.needs import Needs
from lvspec.phases.sampling import Sampler, draw, draw_coupled
from lvspec.phases.slots import Draft
from lvspec.phases.state import DecodeState
from lvspec.phases.verify import Verification
from lvspec.reference.kinds import LOOSE, SHIFT
from lvspec.rule import Rule

_COLUMN = {name: index for index, name in enumerate(Rule._fields)}


class Judgement(NamedTuple):
    """What phase 3 finds.

    Attributes:
        acceptance: What stands.
        stats: Of the rows, with what the target wants in `top_ids[..., 0]`.
        thresholds: float32 `[B]`, relevance from which on a row was an anchor; -inf: all were.
    """

    acceptance: ops.Acceptance
    stats: ops.LogitStats
    thresholds: Tensor


def accept(
    verification: Verification,
    draft: Draft,
    state: DecodeState,
    needs: Needs,
    workspace: Tensor | None = None,
) -> Judgement:
    """Apply the policy of each sequence to its verified draft.

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
        state: Its `rules`, `regret_used`, `num_out` and `sampler` are read; rows are counted in its
            `seen`.
        needs: Of all policies in `state.rules`.
        workspace: Scratch for the operations, see `lvspec.ops.workspace_size`.
    """
    stats = ops.logit_stats(verification.logits, top_k=needs.top_k, workspace=workspace)
    numbers = state.rules.numbers
    if draft.tokens.shape[1] == 1 and state.sampler is None and not needs.gate:
        return Judgement(root_alone(stats), stats, numbers[:, _COLUMN["anchor_threshold"]])
    if state.sampler is not None:
        wanted = _samples(verification.logits, draft, state.sampler)
        top_k = numbers[:, _COLUMN["top_k"], None].clamp(min=1).long()
        stats = stats._replace(top_ids=_wanted_first(stats.top_ids, wanted, top_k))
    relevance = verification.relevance
    if needs.gate:
        numbers, seen = ops.gate(relevance, draft.shape.num_slots, numbers, state.seen)
        state.seen.copy_(seen)
    if needs.chance:
        relevance = _by_chance(relevance, draft, state)
    regret_used = state.regret_used
    if needs.rate:
        # What was earned before; what a path earns is in the rule.
        regret_used = regret_used - numbers[:, _COLUMN["regret_rate"]] * state.num_out
    acceptance = ops.accept(
        verification.logits,
        draft.tokens,
        draft.shape.parents,
        draft.shape.num_slots,
        stats,
        relevance,
        state.rules._replace(numbers=numbers),
        regret_used=regret_used,
    )
    return Judgement(acceptance, stats, numbers[:, _COLUMN["anchor_threshold"]])


def root_alone(stats: ops.LogitStats) -> ops.Acceptance:
    """What `ops.accept` makes of a pass in which nothing was drafted: the target's own token."""
    zeros = torch.zeros_like(stats.top_ids[..., 0])
    return ops.Acceptance(
        path=zeros,
        num_accepted=zeros[:, 0],
        bonus_id=stats.top_ids[:, 0, 0].long(),
        kind=zeros.to(torch.uint8),
        regret=torch.zeros_like(stats.lse[:, 0]),
    )


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


def _wanted_first(top_ids: Tensor, wanted: Tensor, top_k: Tensor) -> Tensor:
    """`top_ids` with the wanted token in front; the first `top_k` are it and the best others.

    The best token takes the place of the wanted one, or of the last of the `top_k` (int64 `[B, 1]`)
    if that was not among them. What the list is used for is a set, so the order behind the first
    does not matter.
    """
    ranks = torch.arange(top_ids.shape[2], device=top_ids.device)
    is_wanted = (top_ids == wanted[..., None]) & (ranks < top_k[..., None])
    rank = torch.where(is_wanted.any(-1), is_wanted.int().argmax(-1), top_k - 1)
    ids = top_ids.scatter(-1, rank[..., None], top_ids[..., :1])
    ids[..., 0] = wanted.int()
    return ids


def _by_chance(relevance: Tensor | None, draft: Draft, state: DecodeState) -> Tensor:
    """Relevance, but numbers drawn evenly from [0, 1) where a policy wants chance.

    They depend on the policy's seed and on the position of a row in its sequence alone.
    """
    numbers = state.rules.numbers
    seed = numbers[:, _COLUMN["random_seed"], None].long()
    position = state.num_out[:, None] + draft.shape.depths
    mixed = position.long() + seed * 0x9E3779B1
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 1)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    drawn = (mixed >> 8).float() / 2**24
    is_chance = numbers[:, _COLUMN["random_share"], None] >= 0
    return torch.where(is_chance, drawn, 0.0 if relevance is None else relevance)
