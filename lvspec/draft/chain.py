"""A small model proposes a chain of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lvspec.attention import lvspec_attention_on
from lvspec.cache import SlotCache
from lvspec.draft.base import Draft, Drafter, DraftShape
from lvspec.models import Model, run_pass
from lvspec.sampling import draw
from lvspec.state import DecodeState
from lvspec.tree import chain_ancestors


class ModelDrafter(Drafter):
    """Drafts a chain of `gamma` tokens with a model that sees the same video.

    Greedily; where the target samples, from the draft's own distribution at that temperature.

    Every draft begins with the last *two* committed tokens: after a full acceptance the model has
    never seen the last drafted token, otherwise the first of the two rows is written again with
    what it held. So the shape is the same in every iteration and no case is special.
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
        device = self.model.device
        self.cache = self.model.new_cache(batch_size=batch_size, capacity=capacity, num_slots=2)
        self._shape = DraftShape.chain(self.gamma, batch_size=batch_size, device=device)
        # Depths and ancestors of the two committed tokens, and of one drafted token.
        self._pair, self._one = (
            (
                torch.arange(slots, device=device),
                chain_ancestors(slots, batch_size=batch_size, device=device),
            )
            for slots in (2, 1)
        )

    def prefill(self, inputs: Mapping[str, Any], sequence: int) -> None:
        """Read the prompt; the target's own prompt if the processors agree."""
        self.model.prefill(inputs, self.cache, sequence)

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        if state.sampler is None:
            proposed, logits = self._tokens(state.last_two, target_kv_len), None
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

        chain = self._chain()
        tokens = chain.run(self._step, state.last_two, target_kv_len, self.cache.kv_len, choose)
        return tokens, torch.cat(rows, dim=1)

    def _step(self, tokens: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
        return self.model.step(tokens, depths, ancestors, self.cache).logits

    def _tokens(self, last_two: Tensor, target_kv_len: Tensor) -> Tensor:
        """int64 `[B, gamma]` behind the last two tokens, int64 `[B, 2]`."""
        cache = self.cache
        arguments = (last_two, target_kv_len, *cache.tensors())
        recorded = None
        if self.model.records(cache):
            key = (*last_two.shape, self.gamma, self._shared_vocab)
            recorded = self.model.recorder.get(key, self._chain, partial(_example, *arguments))
        if recorded is not None:
            return recorded(*arguments)
        return self._chain().run(self._step, last_two, target_kv_len, cache.kv_len)

    def _chain(self) -> _Chain:
        shapes = [self._pair] + [self._one] * (self.gamma - 1)
        return _Chain(self.model, shapes, self._shared_vocab)


def _best(logits: Tensor) -> Tensor:
    """int64 `[B, S]`: the best token of every row."""
    return logits.argmax(-1)


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
        target_kv_len: Tensor,
        kv_len: Tensor,
        choose: Callable[[Tensor], Tensor] = _best,
    ) -> Tensor:
        """The tokens; `step` gives the logits of a pass behind `kv_len`, which moves on."""
        # An empty place of the batch has a length of 0, and nothing before it.
        kv_len.copy_((target_kv_len - 1).clamp(min=0))
        tokens = last_two.clamp(max=self.vocab_size - 1)
        proposed = []
        for depths, ancestors in self.shapes:
            logits = step(tokens, depths, ancestors)
            kv_len.add_(tokens.shape[1])
            tokens = choose(logits[:, -1:, : self.shared_vocab])
            proposed.append(tokens)
        return torch.cat(proposed, dim=1)

    def forward(
        self,
        last_two: Tensor,
        target_kv_len: Tensor,
        k: Tensor,
        v: Tensor,
        kv_len: Tensor,
        visual: Tensor,
        positions: Tensor,
    ) -> Tensor:
        cache = SlotCache.over(k, v, kv_len, visual, positions)

        def step(tokens: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
            return run_pass(self.text, self.head, tokens, depths, ancestors, cache, False)[0]

        return self.run(step, last_two, target_kv_len, kv_len)


def _example(last_two: Tensor, target_kv_len: Tensor, *cached: Tensor) -> tuple[Tensor, ...]:
    """Arguments like these to record with: an empty cache as large as this one."""
    tensors = (torch.zeros_like(x) for x in cached)
    return torch.zeros_like(last_two), torch.ones_like(target_kv_len), *tensors
