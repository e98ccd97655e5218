"""What is verified in one pass: tokens in slots, and how these hang together."""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    def ending(self, tokens: Tensor, eos_ids: Tensor) -> DraftShape:
        """A chain that ends with its first end of sequence: what stands behind it is padding.

        Args:
            tokens: int64 `[B, S]`, the root and what was drafted.
            eos_ids: int64 `[E]`.
        """
        slots = 1 + tokens_up_to_end(tokens[:, 1:], eos_ids)
        return replace(self, num_slots=torch.minimum(self.num_slots, slots))

    def root(self) -> DraftShape:
        """The first slot of each sequence alone."""
        return DraftShape(
            self.parents[:, :1],
            self.ancestors[:, :1],
            self.depths[..., :1],
            torch.ones_like(self.num_slots),
            self.is_chain,
        )


def tokens_up_to_end(tokens: Tensor, eos_ids: Tensor) -> Tensor:
    """How many tokens stand before the first end of sequence or are it: int32 `[B]`.

    Worked example: of `5 2 9 2` with an end of 2 it is two; without one it is all four.

    Args:
        tokens: int64 `[B, n]`.
        eos_ids: int64 `[E]`.
    """
    ends = (tokens[..., None] == eos_ids).any(-1).int()
    return (ends.cumsum(1) - ends == 0).sum(1, dtype=torch.int32)


@dataclass(frozen=True)
class Draft:
    """What the target is asked to verify.

    Attributes:
        tokens: int64 `[B, S]`, slot 0 the root: the last committed token.
        shape: How the slots hang together.
        logits: `[B, S - 1, Vd]`, row r is what `tokens[:, r + 1]` was drawn from; None where the
            tokens were chosen without sampling.
        num_found: int32 `[B]`, where tokens are looked up and a pass may be made without them: how
            many were found, verified or not.
    """

    tokens: Tensor
    shape: DraftShape
    logits: Tensor | None = None
    num_found: Tensor | None = None
