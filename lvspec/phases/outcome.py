"""What an iteration leaves, on the device and for the host to look at later."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lvspec.ops import Acceptance
from lvspec.phases.slots import Draft

Traced = tuple[Draft, Tensor, Tensor | None, Tensor, Acceptance]
"""What a trace keeps of an iteration: what was verified and wanted, how relevant rows were, from
where on they were anchors, what stood."""


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
    """

    draft: Draft
    acceptance: Acceptance
    wanted: Tensor
    relevance: Tensor | None
    thresholds: Tensor
    report: Tensor

    def trace_tensors(self) -> Traced:
        """A copy of what a trace keeps, for the next replay writes over it."""
        shape = self.draft.shape
        shape = replace(shape, parents=shape.parents.clone(), num_slots=shape.num_slots.clone())
        draft = replace(self.draft, tokens=self.draft.tokens.clone(), shape=shape, logits=None)
        relevance = None if self.relevance is None else self.relevance.clone()
        acceptance = Acceptance(*(x.clone() for x in self.acceptance))
        return draft, self.wanted.clone(), relevance, self.thresholds.clone(), acceptance
