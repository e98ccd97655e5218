"""Phase 2, verify: one target forward over all slots gives logits and visual relevance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lvspec.models.cache import SlotCache
from lvspec.models.model import Model
from lvspec.phases.relevance import Scorer
from lvspec.phases.slots import Draft


@dataclass(frozen=True)
class Verification:
    """What the target says of every slot.

    Attributes:
        logits: `[B, S, V]`; row r predicts the children of slot r.
        relevance: float32 `[B, S]`, or None if it was not asked for.
    """

    logits: Tensor
    relevance: Tensor | None


def verify(target: Model, cache: SlotCache, draft: Draft, scorer: Scorer | None) -> Verification:
    """Run the target over the slots of a draft; `scorer` None skips the scores."""
    shape = draft.shape
    output = target.step(
        draft.tokens, shape.depths, shape.ancestors, cache, scores=scorer is not None
    )
    return Verification(output.logits, None if scorer is None else scorer(output))
