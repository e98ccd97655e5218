"""Chains that end before a token that the video decides and of which the draft is unsure."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvspec import ops
from lvspec.phases.draft.model_cache import CachedDrafter, DraftSource
from lvspec.phases.draft.passes import chain_passes
from lvspec.phases.relevance import attention_peak
from lvspec.phases.slots import Draft
from lvspec.phases.state import DecodeState


class AnchorStopDrafter(CachedDrafter):
    """A chain that ends before an unsure anchor; the shape is always that of `gamma` tokens.

    The draft's own row says whether the video decides its token (the peak of its attention) and how
    sure it is; before a token that is probably a wrong anchor the chain ends, as behind an end of
    sequence. On a CPU no pass is run behind the end of the longest chain.

    Args:
        confidence: Probability that an anchor needs.
        anchor_threshold: Peak from which on a row is an anchor.
    """

    def __init__(
        self, source: DraftSource, *, gamma: int, confidence: float, anchor_threshold: float
    ) -> None:
        super().__init__(source, gamma=gamma)
        self.confidence, self.anchor_threshold = confidence, anchor_threshold
        # To look whether all chains have ended would stop a GPU.
        self._may_look = self.model.device.type == "cpu"

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        cache, step = self.cache, self._step(scores=True)
        is_open = ~state.finished
        length = torch.zeros_like(is_open, dtype=torch.int32)
        known = state.last_two.clamp(max=self.model.vocab_size - 1)
        own_length = self._own_length(target_kv_len)
        tokens: list[Tensor] = []
        for output in chain_passes(step, known, own_length, cache, tokens):
            best = ops.logit_stats(output.logits[:, -1:], top_k=1, workspace=cache.workspace)
            probability = (best.top_logits[:, 0, 0] - best.lse[:, 0]).exp()
            is_anchor = ~(attention_peak(output)[:, -1] < self.anchor_threshold)
            is_open = is_open & ~(is_anchor & ~(probability >= self.confidence))
            length += is_open
            tokens.append(self.head.ids(best.top_ids[:, 0]))
            is_open = is_open & ~(tokens[-1] == state.eos_ids).any(1)
            if len(tokens) == self.gamma or (self._may_look and not bool(is_open.any())):
                break
        drafted = pad(torch.cat(tokens, dim=1), (0, self.gamma - len(tokens)))
        shape = replace(self._shape, num_slots=length + 1)
        return Draft(torch.cat([state.last_two[:, 1:], drafted], dim=1), shape)
