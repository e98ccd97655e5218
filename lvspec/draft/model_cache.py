"""A drafter whose model reads the prompt into a cache of its own, or a part of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lvspec.attention import lvspec_attention_on
from lvspec.cache import SlotCache
from lvspec.draft.base import Drafter
from lvspec.draft.pruning import VideoPruning
from lvspec.models import Model


class CachedDrafter(Drafter):
    """Owns a model, its cache, and by how much that is shorter than the target's.

    Attributes:
        model: The model that drafts.
        cache: Its cache, once `allocate` was called.
        removed: int32 `[B]`, rows of the target's prompt that this cache does not have.
    """

    def __init__(self, model: Model, pruning: VideoPruning | None = None) -> None:
        self.model, self._pruning = model, pruning
        self.cache: SlotCache | None = None

    def active(self) -> AbstractContextManager[None]:
        """The model's attention is set for drafting within this context."""
        return lvspec_attention_on(self.model.text)

    def allocate(self, *, batch_size: int, capacity: int) -> None:
        if self.cache is not None:
            self.cache.grow(capacity)
            return
        self.cache = self.model.new_cache(
            batch_size=batch_size, capacity=capacity, num_slots=self._pass_slots
        )
        self.removed = torch.zeros(batch_size, dtype=torch.int32, device=self.model.device)
        self._make_shape(batch_size, self.model.device)

    @property
    def _pass_slots(self) -> int:
        """Slots of the model's own passes at most."""
        return 2

    @abstractmethod
    def _make_shape(self, batch_size: int, device: torch.device) -> None:
        """Prepare what does not change from draft to draft."""

    def prefill(
        self,
        inputs: Mapping[str, Any] | None,
        sequence: int,
        *,
        prompt: Tensor,
        target_cache: SlotCache,
    ) -> None:
        """HF's own forward over the whole prompt; what is kept of it moves together."""
        self.model.prefill(inputs, self.cache, sequence)
        self._keep(self.cache, sequence, prompt, target_cache)

    def _keep(
        self, source: SlotCache, sequence: int, prompt: Tensor, target_cache: SlotCache
    ) -> None:
        """Keep of a prompt that was read into `source` what the pruning says."""
        length = prompt.shape[1]
        if self._pruning is None:
            rows = torch.arange(length, device=prompt.device)
        else:
            visual = source.visual[sequence, :length] != 0
            rows = self._pruning.rows(visual, sequence, prompt=prompt, target_cache=target_cache)
        if source is not self.cache or rows.shape[0] < length:
            self.cache.keep(sequence, rows, source)
        self.removed[sequence] = length - rows.shape[0]

    def _own_length(self, target_kv_len: Tensor) -> Tensor:
        """int32 `[B]`: the committed positions of this cache, given the target's."""
        # An empty place may still have what was removed from the prompt before.
        return (target_kv_len - self.removed).clamp(min=0)
