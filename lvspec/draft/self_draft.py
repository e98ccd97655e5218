"""The target drafts for itself, from a cache with part of the video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lvspec.cache import SlotCache
from lvspec.draft.chain import ModelDrafter


class SelfDrafter(ModelDrafter):
    """Drafts a chain with the target's own weights; its prompt is copied from the target's cache.

    A pass of the target over few video tokens reads fewer keys and values than one over all: worth
    it where those of a long video are as many bytes as the weights. With all of them kept every
    draft is the target's own greedy continuation.
    """

    def prefill(
        self,
        inputs: Mapping[str, Any] | None,
        sequence: int,
        *,
        prompt: Tensor,
        target_cache: SlotCache,
    ) -> None:
        """The kept rows of what the target has read; no forward of its own."""
        self._keep(target_cache, sequence, prompt, target_cache)
