"""A drafter whose model reads the prompt into a cache of its own, or a part of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvspec.models.cache import SlotCache
from lvspec.models.model import Model
from lvspec.phases.draft.base import Drafter
from lvspec.phases.draft.pruning import VideoPruning


@dataclass(frozen=True)
class PromptReading:
    """How a drafter's model comes to its prompt.

    Attributes:
        pruning: What is kept of the video; None: all.
        is_target: Whether the model is the target itself. It then drafts from a copy of what the
            target has read, with the same weights, and no prefill of its own. A pass over few video
            tokens reads fewer keys and values than one over all: worth it where those of a long
            video are as many bytes as the weights.
    """

    pruning: VideoPruning | None = None
    is_target: bool = False


WHOLE_PROMPT = PromptReading()


class CachedDrafter(Drafter):
    """Owns a model, its cache, and by how much that is shorter than the target's.

    Attributes:
        model: The model that drafts.
        cache: Its cache, once `allocate` was called.
        removed: int32 `[B]`, rows of the target's prompt that this cache does not have.
    """

    def __init__(self, model: Model, reading: PromptReading) -> None:
        self.model, self._reading = model, reading
        self.cache: SlotCache | None = None

    def active(self) -> AbstractContextManager[None]:
        """The model is set for drafting within this context."""
        return self.model.active()

    def allocate(self, *, batch_size: int, capacity: int) -> None:
        if self.cache is not None:
            self.cache.grow(capacity)
            return
        self.cache = self.model.new_cache(
            batch_size=batch_size, capacity=capacity, num_slots=self._pass_slots
        )
        self.removed = torch.zeros(batch_size, dtype=torch.int32, device=self.model.device)
        self._make_shape(batch_size, self.model.device)

    def release(self) -> None:
        self.cache = None

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
        source = target_cache
        if not self._reading.is_target:
            source = self.cache
            self.model.prefill(inputs, source, sequence)
        length, pruning = prompt.shape[1], self._reading.pruning
        if pruning is None:
            rows = torch.arange(length, device=prompt.device)
        else:
            visual = source.visual[sequence, :length] != 0
            rows = pruning.rows(visual, sequence, prompt=prompt, target_cache=target_cache)
        if source is not self.cache or rows.shape[0] < length:
            self.cache.keep(sequence, rows, source)
        self.removed[sequence] = length - rows.shape[0]

    def _own_length(self, target_kv_len: Tensor) -> Tensor:
        """int32 `[B]`: the committed positions of this cache, given the target's."""
        # An empty place may still have what was removed from the prompt before.
        return (target_kv_len - self.removed).clamp(min=0)
