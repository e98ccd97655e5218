"""A small model proposes a chain of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lvspec.attention import lvspec_attention_on
from lvspec.cache import SlotCache
from lvspec.draft.base import Draft, Drafter, DraftShape
from lvspec.draft.phase import DraftPhase, Step, read_last_two, run_phase
from lvspec.models import Model
from lvspec.state import DecodeState
from lvspec.tree import chain_ancestors


class ModelDrafter(Drafter):
    """Drafts a chain of `gamma` tokens greedily with a model that sees the same video.

    Every draft begins with the last *two* committed tokens, see `read_last_two`.
    """

    def __init__(self, model: Model, *, gamma: int, target_vocab: int) -> None:
        self.model, self.gamma = model, gamma
        # Ids that only one of the two vocabularies has are padding: never proposed, never read.
        self._shared_vocab = min(model.vocab_size, target_vocab)
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
        self._make_shape(batch_size, self.model.device)

    @property
    def _pass_slots(self) -> int:
        """Slots of the draft's own passes at most."""
        return 2

    def _make_shape(self, batch_size: int, device: torch.device) -> None:
        self._shape = DraftShape.chain(self.gamma, batch_size=batch_size, device=device)

    def prefill(self, inputs: Mapping[str, Any], sequence: int) -> None:
        """Read the prompt; the target's own prompt if the processors agree."""
        self.model.prefill(inputs, self.cache, sequence)

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        proposed = self._run_chain(self.gamma, state, target_kv_len)
        return Draft(torch.cat([state.last_two[:, 1:], proposed], dim=1), self._shape)

    def _run_chain(self, count: int, state: DecodeState, target_kv_len: Tensor) -> Tensor:
        """int64 `[B, count]`: the draft's greedy tokens behind the last two committed ones."""
        return self._run(
            ("chain", count),
            lambda: _Chain(self.model, self._shared_vocab, count),
            state.last_two,
            target_kv_len,
        )

    def _own_length(self, target_kv_len: Tensor) -> Tensor:
        """Positions committed in the draft's cache where the target's has `target_kv_len`."""
        return target_kv_len

    def _run(
        self, key: tuple, make: Callable[[], DraftPhase], last_two: Tensor, target_kv_len: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """Run a phase of this drafter, see `run_phase`."""
        key = (*key, self._shared_vocab)
        own_length = self._own_length(target_kv_len)
        return run_phase(self.model, self.cache, key, make, last_two, own_length)


class _Chain(DraftPhase):
    """Each token is the best behind the one before: int64 `[B, gamma]`."""

    def __init__(self, model: Model, shared_vocab: int, gamma: int) -> None:
        super().__init__(model, shared_vocab)
        self.gamma = gamma

    def run(self, step: Step, last_two: Tensor, own_length: Tensor, cache: SlotCache) -> Tensor:
        batch_size, device = len(last_two), last_two.device
        depths = torch.zeros(1, dtype=torch.int64, device=device)
        ancestors = chain_ancestors(1, batch_size=batch_size, device=device)
        logits = read_last_two(step, last_two, own_length, cache).logits
        proposed = []
        for _ in range(self.gamma):
            proposed.append(logits[:, -1:, : self.shared_vocab].argmax(-1))
            if len(proposed) < self.gamma:
                cache.kv_len.add_(1)
                logits = step(proposed[-1], depths, ancestors).logits
        return torch.cat(proposed, dim=1)
