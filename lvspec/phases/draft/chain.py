"""A small model proposes a chain of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec.phases.draft.model_cache import CachedDrafter
from lvspec.phases.draft.passes import GreedyChain, chain_passes
from lvspec.phases.sampling import draw
from lvspec.phases.slots import Draft
from lvspec.phases.state import DecodeState


class ModelDrafter(CachedDrafter):
    """Drafts a chain of `gamma` tokens with a model that sees the same video.

    Greedily; where the target samples, from the draft's own distribution at that temperature.
    """

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        if state.sampler is None:
            proposed, logits = self._greedy(state, target_kv_len), None
        else:
            proposed, logits = self._sampled(state, target_kv_len)
        tokens = torch.cat([state.last_two[:, 1:], proposed], dim=1)
        return Draft(tokens, self._shape, logits)

    def _greedy(self, state: DecodeState, target_kv_len: Tensor) -> Tensor:
        """int64 `[B, gamma]`: the draft's best tokens behind the last two committed ones."""
        return self._run(
            ("chain", self.gamma),
            lambda: GreedyChain(self.model, self.head, self.gamma),
            state.last_two,
            target_kv_len,
        )

    def _sampled(self, state: DecodeState, target_kv_len: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 `[B, gamma]`, and the logits `[B, gamma, V]` they were drawn from."""
        sampler = state.sampler
        known = state.last_two.clamp(max=self.model.vocab_size - 1)
        own_length = self._own_length(target_kv_len)
        tokens: list[Tensor] = []
        rows: list[Tensor] = []
        for output in chain_passes(self._step(), known, own_length, self.cache, tokens):
            uniforms = sampler.drafts[:, len(rows), None]
            rows.append(sampler.warp(output.logits[:, -1:]))
            tokens.append(self.head.ids(draw(rows[-1], uniforms)))
            if len(tokens) == self.gamma:
                break
        logits = self.head.over_ids(torch.cat(rows, dim=1), self._source.shared_vocab)
        return torch.cat(tokens, dim=1), logits
