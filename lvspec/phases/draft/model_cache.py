"""A drafter whose model reads the prompt into a cache of its own, or a part of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lvspec import ops
from lvspec.models.cache import Beginning, SlotCache
from lvspec.models.head import draft_head
from lvspec.models.model import Model
from lvspec.phases.draft.base import Drafter
from lvspec.phases.draft.passes import DraftPhase, Step, run_phase
from lvspec.phases.draft.pruning import VideoPruning
from lvspec.phases.slots import Draft, DraftShape


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


@dataclass(frozen=True)
class DraftSource:
    """The model that drafts, and what of it is used.

    Attributes:
        model: Who drafts.
        target_vocab: Rows of the target's vocabulary.
        draft_vocab: Ids that may be proposed, ascending, of both vocabularies; None: all of them.
        reading: How the model comes to its prompt.
    """

    model: Model
    target_vocab: int
    draft_vocab: tuple[int, ...] | None = None
    reading: PromptReading = PromptReading()

    @property
    def shared_vocab(self) -> int:
        """Ids that both vocabularies have; others are padding: never proposed, never read."""
        return min(self.model.vocab_size, self.target_vocab)


class CachedDrafter(Drafter):
    """Owns a model, its cache, and by how much that is shorter than the target's.

    Every draft begins with the last *two* committed tokens, see `read_last_two`.

    Args:
        source: The model that drafts.
        gamma: Draft tokens of one pass of the target at most.
        pass_slots: Slots of the model's own passes at most.

    Attributes:
        model: The model that drafts.
        head: Makes the logits that are drafted from.
        cache: The model's, once `allocate` was called.
        removed: int32 `[B]`, rows of the target's prompt that this cache does not have.
    """

    def __init__(self, source: DraftSource, *, gamma: int, pass_slots: int = 2) -> None:
        self.model, self._source, self._pass_slots = source.model, source, pass_slots
        self.gamma = gamma
        self.cache: SlotCache | None = None
        self._take_head()

    def _take_head(self) -> None:
        source = self._source
        self.head = draft_head(source.model.hf.lm_head, source.shared_vocab, source.draft_vocab)

    @property
    def has_plan(self) -> bool:
        return self.cache is not None and self.cache.plan is not None

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model is set for drafting within this context."""
        with self.model.active():
            if self._source.draft_vocab is not None:  # copied rows are as the head's are now
                self._take_head()
            yield

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

    def _make_shape(self, batch_size: int, device: torch.device) -> None:
        """Prepare what does not change from draft to draft. Here: the shape of a chain."""
        self._shape = DraftShape.chain(self.gamma, batch_size=batch_size, device=device)

    def prefill(
        self,
        inputs: Mapping[str, Any] | None,
        sequence: int,
        *,
        prompt: Tensor,
        target_cache: SlotCache,
        beginning: Beginning | None = None,
    ) -> None:
        """HF's own forward over the whole prompt; what is kept of it moves together."""
        source, pruning = target_cache, self._source.reading.pruning
        if not self._source.reading.is_target:
            source = self.cache
            # Of a video that is kept in part every prompt has other rows.
            begun = beginning if pruning is None else None
            self.model.prefill(inputs, source, sequence, beginning=begun)
        length = prompt.shape[1]
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

    def _step(self, **options: Any) -> Step:
        """A pass of the model for this drafter, run by itself."""
        return partial(self.model.step, cache=self.cache, head=self.head, **options)

    def _run(
        self, phase: DraftPhase, last_two: Tensor, target_kv_len: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """Run a phase of this drafter, see `run_phase`."""
        own_length = self._own_length(target_kv_len)
        return run_phase(phase, self.model, self.cache, last_two, own_length)

    def commit(self, draft: Draft, acceptance: ops.Acceptance, target_kv_len: Tensor) -> None:
        """Accepted rows of a tree move to where the sequence goes on; those of a chain stand there.

        No pass writes rows of leaves: where one is accepted it is the last of its path, whose row
        the next draft begins with.
        """
        if not draft.shape.is_chain:
            cache, length = self.cache, self._own_length(target_kv_len)
            ops.commit_kv(cache.k, cache.v, length, acceptance.path, acceptance.num_accepted)
