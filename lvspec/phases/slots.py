"""What is verified in one pass: tokens in slots, and how these hang together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lvspec.tree import chain_ancestors, chain_parents


@dataclass(frozen=True)
class DraftShape:
    """How the slots of a draft hang together.

    Attributes:
        parents: int32 `[B, S]`.
        ancestors: int64 `[B, S]`.
        depths: int64 `[S]` or `[B, S]`.
        num_slots: int32 `[B]`; slots from there on are padding.
        is_chain: Whether every slot stands behind the one before it, so that accepted rows of the
            cache already stand where they belong.
    """

    parents: Tensor
    ancestors: Tensor
    depths: Tensor
    num_slots: Tensor
    is_chain: bool

    @classmethod
    def chain(cls, gamma: int, *, batch_size: int, device: torch.device) -> DraftShape:
        """A root and `gamma` tokens, one behind the other."""
        slots = gamma + 1
        return cls(
            chain_parents(slots, batch_size=batch_size, device=device),
            chain_ancestors(slots, batch_size=batch_size, device=device),
            torch.arange(slots, device=device),
            torch.full((batch_size,), slots, dtype=torch.int32, device=device),
            is_chain=True,
        )


@dataclass(frozen=True)
class Draft:
    """What the target is asked to verify.

    Attributes:
        tokens: int64 `[B, S]`, slot 0 the root: the last committed token.
        shape: How the slots hang together.
        logits: `[B, S - 1, Vd]`, row r is what `tokens[:, r + 1]` was drawn from; None where the
            tokens were chosen without sampling.
    """

    tokens: Tensor
    shape: DraftShape
    logits: Tensor | None = None
