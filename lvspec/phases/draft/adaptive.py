"""Chains that end early: where drafting on is not worth it, or before an unsure anchor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvspec import ops
from lvspec.models.cache import SlotCache
from lvspec.phases.draft.cost import chain_speedups
from lvspec.phases.draft.model_cache import CachedDrafter, DraftSource
from lvspec.phases.draft.passes import GreedyChain, chain_passes
from lvspec.phases.relevance import attention_peak
from lvspec.phases.slots import Draft
from lvspec.phases.state import DecodeState

_MEMORY = 0.9  # what an iteration's acceptance counts for one iteration later
_LENGTHS = 4  # a CPU drafts a multiple of this, so that few phases are recorded
_PRIOR = (1.9, 2.0)  # accepted, of so many: what is believed of a sequence that begins


class AdaptiveChainDrafter(CachedDrafter):
    """A chain whose `num_slots` differ; the shape is always that of `gamma` tokens.

    Adaptive length: the best by the cost model (`cost.py`) for each sequence's own acceptance
    so far, of which the latest iterations count most, and which stays on the device.

    Unsure anchors. The draft's own row says whether the video decides its token (the peak of its
    attention) and how sure it is; before a token that is probably a wrong anchor the chain ends.

    On a CPU hardly a pass is run behind the end of the longest chain.

    Args:
        cost_ratio: Of a draft step to a pass of the target; None: no adaptive length.
        confidence: Probability that an anchor needs; None: anchors are drafted like other tokens.
        anchor_threshold: Peak from which on a row is an anchor.
    """

    def __init__(
        self,
        source: DraftSource,
        *,
        gamma: int,
        cost_ratio: float | None,
        confidence: float | None,
        anchor_threshold: float,
    ) -> None:
        super().__init__(source, gamma=gamma)
        self.cost_ratio, self.confidence = cost_ratio, confidence
        self.anchor_threshold = anchor_threshold
        # To look whether all chains have ended would stop a GPU.
        self._may_look = self.model.device.type == "cpu"

    def _make_shape(self, batch_size: int, device: torch.device) -> None:
        super()._make_shape(batch_size, device)
        self._steps = torch.arange(self.gamma + 1, device=device)
        self._prior = torch.tensor(_PRIOR, device=device)
        # Accepted tokens and those that were put to the test, float32 [B, 2].
        self._counts = self._prior.repeat(batch_size, 1)

    def prefill(
        self,
        inputs: Mapping[str, Any] | None,
        sequence: int,
        *,
        prompt: Tensor,
        target_cache: SlotCache,
    ) -> None:
        super().prefill(inputs, sequence, prompt=prompt, target_cache=target_cache)
        self._counts[sequence] = self._prior

    def lengths(self) -> Tensor:
        """int64 `[B]`: draft tokens that are worth it, from 1 to `gamma`."""
        if self.cost_ratio is None:
            return self._steps[-1:].expand(len(self._counts))
        chance = self._counts[:, :1] / self._counts[:, 1:]
        return chain_speedups(chance, self.cost_ratio, self._steps)[:, 1:].argmax(1) + 1

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        wanted = self.lengths()
        if self.confidence is None:
            tokens, length = self._tokens(wanted, state, target_kv_len), wanted
        else:
            tokens, length = self._tokens_before_doubt(wanted, state, target_kv_len)
        shape = replace(self._shape, num_slots=(length + 1).int())
        padded = pad(tokens, (0, self.gamma - tokens.shape[1]))
        tokens = torch.cat([state.last_two[:, 1:], padded], dim=1)
        return Draft(tokens, shape.ending(tokens, state.eos_ids))

    def _tokens(self, wanted: Tensor, state: DecodeState, target_kv_len: Tensor) -> Tensor:
        """int64 `[B, n]`, n <= gamma, at least as many as are wanted."""
        count = self.gamma
        if self._may_look:
            most = int(wanted.masked_fill(state.finished, 1).max())
            # One phase for several lengths: each is recorded when it is first run.
            count = min(count, -(-most // _LENGTHS) * _LENGTHS)
        return self._run(
            ("chain", count),
            lambda: GreedyChain(self.model, self.head, count),
            state.last_two,
            target_kv_len,
        )

    def _tokens_before_doubt(
        self, wanted: Tensor, state: DecodeState, target_kv_len: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same pass by pass, and how many tokens stand before an unsure anchor, `[B]`."""
        cache, step = self.cache, self._step(scores=True)
        length = torch.zeros_like(wanted)
        is_open = ~state.finished
        known = state.last_two.clamp(max=self.model.vocab_size - 1)
        own_length = self._own_length(target_kv_len)
        tokens: list[Tensor] = []
        for output in chain_passes(step, known, own_length, cache, tokens):
            best = ops.logit_stats(output.logits[:, -1:], top_k=1, workspace=cache.workspace)
            probability = (best.top_logits[:, 0, 0] - best.lse[:, 0]).exp()
            is_anchor = ~(attention_peak(output)[:, -1] < self.anchor_threshold)
            is_unsure = is_anchor & ~(probability >= self.confidence)
            is_open = is_open & (len(tokens) < wanted) & ~is_unsure
            length += is_open
            tokens.append(self.head.ids(best.top_ids[:, 0]))
            is_open &= ~(tokens[-1] == state.eos_ids).any(1)
            if len(tokens) == self.gamma or (self._may_look and not bool(is_open.any())):
                break
        return torch.cat(tokens, dim=1), length

    def commit(self, draft: Draft, acceptance: ops.Acceptance, target_kv_len: Tensor) -> None:
        accepted = acceptance.num_accepted
        tested = torch.minimum(accepted + 1, draft.shape.num_slots - 1)
        self._counts.mul_(_MEMORY).add_(torch.stack([accepted, tested], dim=1))
