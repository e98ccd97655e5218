"""A small model proposes a chain of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lvspec.cache import SlotCache
from lvspec.draft.base import Draft, DraftShape
from lvspec.draft.model_cache import WHOLE_PROMPT, CachedDrafter, PromptReading
from lvspec.draft.phase import DraftPhase, Step, read_last_two, run_phase
from lvspec.models import Model
from lvspec.state import DecodeState
from lvspec.tree import chain_ancestors


class ModelDrafter(CachedDrafter):
    """Drafts a chain of `gamma` tokens greedily with a model that sees the same video.

    Every draft begins with the last *two* committed tokens, see `read_last_two`.

    Args:
        model: Who drafts.
        gamma: Draft tokens of one pass.
        target_vocab: Rows of the target's vocabulary.
        reading: How the model comes to its prompt.
    """

    def __init__(
        self,
        model: Model,
        *,
        gamma: int,
        target_vocab: int,
        reading: PromptReading = WHOLE_PROMPT,
    ) -> None:
        super().__init__(model, reading)
        self.gamma = gamma
        # Ids that only one of the two vocabularies has are padding: never proposed, never read.
        self._shared_vocab = min(model.vocab_size, target_vocab)

    def _make_shape(self, batch_size: int, device: torch.device) -> None:
        self._shape = DraftShape.chain(self.gamma, batch_size=batch_size, device=device)

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
