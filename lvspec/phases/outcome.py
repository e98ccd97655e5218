"""What an iteration leaves, on the device and for the host to look at later."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from lvspec.ops import Acceptance, LogitStats
from lvspec.phases.slots import Draft


class Rows(NamedTuple):
    """What the target's rows hold, for a trace. Floats have the dtype of `LogitStats`.

    Attributes:
        top_ids: int32 `[B, S, K]`, best first; where the target samples, the sample first.
        top_log_probs: `[B, S, K]`, nats.
        entropy: `[B, S]`, nats.
        log_probs: `[B, S]`, of each drafted token in the row before it; the root's is no number.
        regrets: `[B, S]`, by how much the best of that row is better, likewise.
    """

    top_ids: Tensor
    top_log_probs: Tensor
    entropy: Tensor
    log_probs: Tensor
    regrets: Tensor

    @classmethod
    def of(cls, logits: Tensor, draft: Draft, stats: LogitStats) -> Rows:
        """Of logits `[B, S, V]` and what was found of them."""
        top = logits.gather(2, stats.top_ids.long()).to(stats.lse.dtype)
        before = draft.shape.parents.clamp(min=0).long()
        own = logits.flatten(1).gather(1, before * logits.shape[2] + draft.tokens.long())
        own = own.to(stats.lse.dtype)
        return cls(
            stats.top_ids,
            top - stats.lse[..., None],
            stats.entropy,
            own - stats.lse.gather(1, before),
            stats.top_logits[..., 0].gather(1, before) - own,
        )


class Traced(NamedTuple):
    """What a trace keeps of an iteration; fields as of `Outcome`."""

    draft: Draft
    wanted: Tensor
    relevance: Tensor | None
    thresholds: Tensor
    acceptance: Acceptance
    rows: Rows


@dataclass(frozen=True)
class Outcome:
    """What an iteration leaves on the device.

    Attributes:
        draft: What was verified.
        acceptance: What stood.
        wanted: int32 `[B, S]`, the target's choice at each slot.
        relevance: float32 `[B, S]`, or None where it was not computed.
        thresholds: float32 `[B]`, relevance from which on a row was an anchor.
        report: int64 `[B, HEAD + parts * S]`, see `commit`. Where the draft has a `num_found` that
            stands in place of the slots that were verified, plus one.
        rows: What the target's rows hold, where a trace is kept.
    """

    draft: Draft
    acceptance: Acceptance
    wanted: Tensor
    relevance: Tensor | None
    thresholds: Tensor
    report: Tensor
    rows: Rows | None = None

    def trace_tensors(self) -> Traced:
        """A copy of what a trace keeps, for the next replay writes over it."""
        shape = self.draft.shape
        shape = replace(shape, parents=shape.parents.clone(), num_slots=shape.num_slots.clone())
        draft = replace(self.draft, tokens=self.draft.tokens.clone(), shape=shape, logits=None)
        relevance = None if self.relevance is None else self.relevance.clone()
        acceptance = Acceptance(*(x.clone() for x in self.acceptance))
        rows = Rows(*(x.clone() for x in self.rows))
        thresholds = self.thresholds.clone()
        return Traced(draft, self.wanted.clone(), relevance, thresholds, acceptance, rows)
