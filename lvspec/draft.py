"""Phase 1, draft: a small model proposes a chain of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lvspec.attention import lvspec_attention_on
from lvspec.cache import SlotCache
from lvspec.models import Model
from lvspec.tree import chain_ancestors


class ModelDrafter:
    """Drafts a chain of `gamma` tokens greedily with a model that sees the same video.

    Every draft begins with the last *two* committed tokens: after a full acceptance the model has
    never seen the last drafted token, otherwise the first of the two rows is written again with
    what it held. So the shape is the same in every iteration and no case is special.
    """

    def __init__(self, model: Model, *, gamma: int, target_vocab: int) -> None:
        self.model, self.gamma = model, gamma
        # Ids that only one of the two vocabularies has are padding: never proposed, never read.
        self._shared_vocab = min(model.vocab_size, target_vocab)
        device = model.device
        # Depths and ancestors of the two committed tokens, and of one drafted token.
        self._pair, self._one = (
            (
                torch.arange(slots, device=device),
                chain_ancestors(slots, batch_size=1, device=device),
            )
            for slots in (2, 1)
        )
        self.cache: SlotCache | None = None

    def active(self) -> AbstractContextManager[None]:
        """The model's attention is set for drafting within this context."""
        return lvspec_attention_on(self.model.text)

    def prefill(self, inputs: Mapping[str, Any], *, capacity: int) -> None:
        """Read the prompt; the target's own prompt if the processors agree."""
        self.cache = self.model.new_cache(batch_size=1, capacity=capacity, num_slots=2)
        self.model.prefill(inputs, self.cache, 0)

    def propose(self, last_two: Tensor, target_kv_len: Tensor) -> Tensor:
        """The next `gamma` tokens by the draft.

        Args:
            last_two: int64 `[B, 2]`, the last two committed tokens; the second is the root.
            target_kv_len: int32 `[B]`, positions committed in the target's cache (the root's is
                not among them).

        Returns:
            int64 `[B, gamma]`.
        """
        cache = self.cache
        cache.kv_len.copy_(target_kv_len - 1)
        tokens = last_two.clamp(max=self.model.vocab_size - 1)
        proposed = []
        for depths, ancestors in [self._pair] + [self._one] * (self.gamma - 1):
            logits = self.model.step(tokens, depths, ancestors, cache).logits
            cache.kv_len.add_(tokens.shape[1])
            tokens = logits[:, -1:, : self._shared_vocab].argmax(-1)
            proposed.append(tokens)
        return torch.cat(proposed, dim=1)
