"""A small model proposes a chain of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvspec.phases.draft.model_cache import CachedDrafter, DraftSource
from lvspec.phases.draft.passes import GoneOnChain, GreedyChain, chain_passes
from lvspec.phases.sampling import draw
from lvspec.phases.slots import Draft
from lvspec.phases.state import DecodeState

PIECE = 4
"""Passes after which a CPU looks whether all chains have ended."""


class ModelDrafter(CachedDrafter):
    """Drafts a chain of `gamma` tokens with a model that sees the same video.

    Greedily; where the target samples, from the draft's own distribution at that temperature. A
    chain ends with the draft's own end of sequence, and what stands behind is padding. On a CPU
    hardly a pass is run behind the end of the longest chain.
    """

    def __init__(self, source: DraftSource, *, gamma: int) -> None:
        super().__init__(source, gamma=gamma)
        # To look whether all chains have ended would stop a GPU.
        self._may_look = self.model.device.type == "cpu"

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        if state.sampler is None:
            proposed, logits = self._greedy(state, target_kv_len), None
        else:
            proposed, logits = self._sampled(state, target_kv_len)
            logits = pad(logits, (0, 0, 0, self.gamma - logits.shape[1]))
        proposed = pad(proposed, (0, self.gamma - proposed.shape[1]))
        tokens = torch.cat([state.last_two[:, 1:], proposed], dim=1)
        return Draft(tokens, self._shape.ending(tokens, state.eos_ids), logits)

    def _greedy(self, state: DecodeState, target_kv_len: Tensor) -> Tensor:
        """int64 `[B, n]`, n <= gamma: the draft's best tokens behind the last two committed."""
        count = self.gamma
        if self._may_look:
            count = (count - 1) % PIECE + 1
        tokens = self._run(GreedyChain(self.head, count), state.last_two, target_kv_len)
        while tokens.shape[1] < self.gamma and self._is_open(tokens, state):
            more = self._run(GoneOnChain(self.head, PIECE), tokens[:, -1:], target_kv_len)
            tokens = torch.cat([tokens, more], dim=1)
        return tokens

    def _sampled(self, state: DecodeState, target_kv_len: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 `[B, n]`, and the logits `[B, n, V]` they were drawn from; n <= gamma."""
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
            if self._may_look and not self._is_open(torch.cat(tokens, dim=1), state):
                break
        logits = self.head.over_ids(torch.cat(rows, dim=1), self._source.shared_vocab)
        return torch.cat(tokens, dim=1), logits

    def _is_open(self, tokens: Tensor, state: DecodeState) -> bool:
        """Whether a chain that is wanted has not ended; asked on a CPU alone."""
        has_ended = (tokens[..., None] == state.eos_ids).flatten(1).any(1)
        return not bool((has_ended | state.finished).all())
