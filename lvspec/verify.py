"""Phase 2, verify: one target forward over all slots gives logits and visual relevance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lvspec.cache import SlotCache
from lvspec.models import Model
from lvspec.relevance import Scorer
from lvspec.tree import chain_ancestors, chain_parents


@dataclass(frozen=True)
class DraftShape:
    """The shape that every draft of a run has.

    Attributes:
        parents: int32 `[B, S]`.
        ancestors: int64 `[B, S]`.
        depths: int64 `[S]`.
        num_slots: int32 `[B]`.
    """

    parents: Tensor
    ancestors: Tensor
    depths: Tensor
    num_slots: Tensor

    @classmethod
    def chain(cls, gamma: int, device: torch.device) -> DraftShape:
        slots = gamma + 1
        return cls(
            chain_parents(slots, batch_size=1, device=device),
            chain_ancestors(slots, batch_size=1, device=device),
            torch.arange(slots, device=device),
            torch.full((1,), slots, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class Verification:
    """What the target says of every slot.

    Attributes:
        logits: `[B, S, V]`; row r predicts the children of slot r.
        relevance: float32 `[B, S]`, or None if it was not asked for.
    """

    logits: Tensor
    relevance: Tensor | None


def verify(
    target: Model, cache: SlotCache, tokens: Tensor, shape: DraftShape, scorer: Scorer | None
) -> Verification:
    """Run the target over `tokens` `[B, S]`, slot 0 the root; `scorer` None skips the scores."""
    output = target.step(tokens, shape.depths, shape.ancestors, cache, scores=scorer is not None)
    return Verification(output.logits, None if scorer is None else scorer(output))
