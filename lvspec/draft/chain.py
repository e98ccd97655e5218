"""A small model proposes a chain of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lvspec.cache import SlotCache
from lvspec.draft.base import Draft, DraftShape
from lvspec.draft.model_cache import CachedDrafter
from lvspec.draft.pruning import VideoPruning
from lvspec.models import Model, run_pass
from lvspec.state import DecodeState
from lvspec.tree import chain_ancestors


class ModelDrafter(CachedDrafter):
    """Drafts a chain of `gamma` tokens greedily with a model that sees the same video.

    Every draft begins with the last *two* committed tokens: after a full acceptance the model has
    never seen the last drafted token, otherwise the first of the two rows is written again with
    what it held. So the shape is the same in every iteration and no case is special.
    """

    def __init__(
        self,
        model: Model,
        *,
        gamma: int,
        target_vocab: int,
        pruning: VideoPruning | None = None,
    ) -> None:
        super().__init__(model, pruning)
        self.gamma = gamma
        # Ids that only one of the two vocabularies has are padding: never proposed, never read.
        self._shared_vocab = min(model.vocab_size, target_vocab)

    def _make_shape(self, batch_size: int, device: torch.device) -> None:
        self._shape = DraftShape.chain(self.gamma, batch_size=batch_size, device=device)
        # Depths and ancestors of the two committed tokens, and of one drafted token.
        self._pair, self._one = (
            (
                torch.arange(slots, device=device),
                chain_ancestors(slots, batch_size=batch_size, device=device),
            )
            for slots in (2, 1)
        )

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        proposed = self._tokens(state.last_two, self._own_length(target_kv_len))
        return Draft(torch.cat([state.last_two[:, 1:], proposed], dim=1), self._shape)

    def _tokens(self, last_two: Tensor, committed: Tensor) -> Tensor:
        """int64 `[B, gamma]` behind the last two tokens, int64 `[B, 2]`.

        `committed`: int32 `[B]`, the committed positions of this model's cache.
        """
        cache = self.cache
        arguments = (last_two, committed, *cache.tensors())
        recorded = None
        if self.model.records(cache):
            key = (*last_two.shape, self.gamma, self._shared_vocab)
            recorded = self.model.recorder.get(key, self._chain, partial(_example, *arguments))
        if recorded is not None:
            return recorded(*arguments)

        def step(tokens: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
            return self.model.step(tokens, depths, ancestors, cache).logits

        return self._chain().run(step, last_two, committed, cache.kv_len)

    def _chain(self) -> _Chain:
        shapes = [self._pair] + [self._one] * (self.gamma - 1)
        return _Chain(self.model, shapes, self._shared_vocab)


class _Chain(nn.Module):
    """A whole draft phase, as a module of tensors so that it can be recorded in one piece."""

    def __init__(
        self, model: Model, shapes: list[tuple[Tensor, Tensor]], shared_vocab: int
    ) -> None:
        super().__init__()
        self.text, self.head = model.text, model.hf.lm_head
        self.vocab_size, self.shared_vocab, self.shapes = model.vocab_size, shared_vocab, shapes

    def run(
        self,
        step: Callable[[Tensor, Tensor, Tensor], Tensor],
        last_two: Tensor,
        committed: Tensor,
        kv_len: Tensor,
    ) -> Tensor:
        """The tokens; `step` gives the logits of a pass behind `kv_len`, which moves on."""
        # An empty place of the batch has a length of 0, and nothing before it.
        kv_len.copy_((committed - 1).clamp(min=0))
        tokens = last_two.clamp(max=self.vocab_size - 1)
        proposed = []
        for depths, ancestors in self.shapes:
            logits = step(tokens, depths, ancestors)
            kv_len.add_(tokens.shape[1])
            tokens = logits[:, -1:, : self.shared_vocab].argmax(-1)
            proposed.append(tokens)
        return torch.cat(proposed, dim=1)

    def forward(
        self,
        last_two: Tensor,
        committed: Tensor,
        k: Tensor,
        v: Tensor,
        kv_len: Tensor,
        visual: Tensor,
        positions: Tensor,
    ) -> Tensor:
        cache = SlotCache.over(k, v, kv_len, visual, positions)

        def step(tokens: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
            return run_pass(self.text, self.head, tokens, depths, ancestors, cache, False)[0]

        return self.run(step, last_two, committed, kv_len)


def _example(last_two: Tensor, committed: Tensor, *cached: Tensor) -> tuple[Tensor, ...]:
    """Arguments like these to record with: an empty cache as large as this one."""
    tensors = (torch.zeros_like(x) for x in cached)
    return torch.zeros_like(last_two), torch.ones_like(committed), *tensors
