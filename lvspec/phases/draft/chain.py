"""A small model proposes a chain of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lvspec.models.cache import SlotCache
from lvspec.models.head import DraftHead, draft_head
from lvspec.models.model import Model
from lvspec.phases.draft.base import Draft, DraftShape
from lvspec.phases.draft.model_cache import WHOLE_PROMPT, CachedDrafter, PromptReading
from lvspec.phases.draft.passes import DraftPhase, Step, read_last_two, run_phase
from lvspec.phases.sampling import draw
from lvspec.phases.state import DecodeState
from lvspec.tree import chain_ancestors


class ModelDrafter(CachedDrafter):
    """Drafts a chain of `gamma` tokens with a model that sees the same video.

    Greedily; where the target samples, from the draft's own distribution at that temperature.

    Every draft begins with the last *two* committed tokens, see `read_last_two`.

    Args:
        model: Who drafts.
        gamma: Draft tokens of one pass.
        target_vocab: Rows of the target's vocabulary.
        draft_vocab: Ids that may be proposed, ascending, of both vocabularies; None: all of them.
        reading: How the model comes to its prompt.

    Attributes:
        head: Makes the logits that are drafted from.
    """

    def __init__(
        self,
        model: Model,
        *,
        gamma: int,
        target_vocab: int,
        draft_vocab: tuple[int, ...] | None = None,
        reading: PromptReading = WHOLE_PROMPT,
    ) -> None:
        super().__init__(model, reading)
        self.gamma = gamma
        # Ids that only one of the two vocabularies has are padding: never proposed, never read.
        self._shared_vocab = min(model.vocab_size, target_vocab)
        self._draft_vocab = draft_vocab
        self.head = draft_head(model.hf.lm_head, self._shared_vocab, draft_vocab)

    @contextmanager
    def active(self) -> Iterator[None]:
        with super().active():
            if self._draft_vocab is not None:  # copied rows are as those of the head are now
                self.head = draft_head(self.model.hf.lm_head, self._shared_vocab, self._draft_vocab)
            yield

    def _make_shape(self, batch_size: int, device: torch.device) -> None:
        self._shape = DraftShape.chain(self.gamma, batch_size=batch_size, device=device)

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        if state.sampler is None:
            proposed, logits = self._run_chain(self.gamma, state, target_kv_len), None
        else:
            proposed, logits = self._sampled(state, target_kv_len)
        tokens = torch.cat([state.last_two[:, 1:], proposed], dim=1)
        return Draft(tokens, self._shape, logits)

    def _sampled(self, state: DecodeState, target_kv_len: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 `[B, gamma]`, and the logits `[B, gamma, V]` they were drawn from."""
        sampler, rows = state.sampler, []

        def choose(logits: Tensor) -> Tensor:
            uniforms = sampler.drafts[:, len(rows), None]
            rows.append(sampler.warp(logits))
            return draw(rows[-1], uniforms)

        chain = _Chain(self.model, self.head, self.gamma)
        known = state.last_two.clamp(max=self.model.vocab_size - 1)
        own_length = self._own_length(target_kv_len)
        tokens = chain.run(self._step(), known, own_length, self.cache, choose)
        return tokens, self.head.over_ids(torch.cat(rows, dim=1), self._shared_vocab)

    def _step(self, **options: Any) -> Step:
        """A pass of the model for this drafter, run by itself."""
        return partial(self.model.step, cache=self.cache, head=self.head, **options)

    def _run_chain(self, count: int, state: DecodeState, target_kv_len: Tensor) -> Tensor:
        """int64 `[B, count]`: the draft's greedy tokens behind the last two committed ones."""
        return self._run(
            ("chain", count),
            lambda: _Chain(self.model, self.head, count),
            state.last_two,
            target_kv_len,
        )

    def _run(
        self, key: tuple, make: Callable[[], DraftPhase], last_two: Tensor, target_kv_len: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """Run a phase of this drafter, see `run_phase`."""
        key = (*key, self.head.key)
        own_length = self._own_length(target_kv_len)
        return run_phase(self.model, self.cache, key, make, last_two, own_length)


def _best(logits: Tensor) -> Tensor:
    """int64 `[B, S]`: the best column of every row."""
    return logits.argmax(-1)


class _Chain(DraftPhase):
    """Each token is chosen from the row of the one before: int64 `[B, gamma]`."""

    def __init__(self, model: Model, head: DraftHead, gamma: int) -> None:
        super().__init__(model, head)
        self.gamma = gamma

    def run(
        self,
        step: Step,
        last_two: Tensor,
        own_length: Tensor,
        cache: SlotCache,
        choose: Callable[[Tensor], Tensor] = _best,
    ) -> Tensor:
        batch_size, device = len(last_two), last_two.device
        depths = torch.zeros(1, dtype=torch.int64, device=device)
        ancestors = chain_ancestors(1, batch_size=batch_size, device=device)
        logits = read_last_two(step, last_two, own_length, cache).logits
        proposed = []
        for _ in range(self.gamma):
            proposed.append(self.head.ids(choose(logits[:, -1:])))
            if len(proposed) < self.gamma:
                cache.kv_len.add_(1)
                logits = step(proposed[-1], depths, ancestors).logits
        return torch.cat(proposed, dim=1)
