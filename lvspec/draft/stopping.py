"""Chains that end early: where drafting on is not worth it, or before an unsure anchor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lvspec import ops
from lvspec.draft.base import Draft
from lvspec.draft.chain import ModelDrafter
from lvspec.draft.phase import read_last_two
from lvspec.models import Model
from lvspec.relevance import attention_peak
from lvspec.state import DecodeState
from lvspec.tree import chain_ancestors

_MEMORY = 0.9  # what an iteration's acceptance counts for one iteration later
_PRIOR = (1.9, 2.0)  # accepted, of so many: what is believed of a sequence that begins


class StoppingDrafter(ModelDrafter):
    """A chain whose `num_slots` differ; the shape is always that of `gamma` tokens.

    Adaptive length. With a chance of `a` that a drafted token is accepted, g tokens give
    `1 + a + ... + a^g` for `1 + cost_ratio * g` passes of the target; the g of the best ratio is
    taken. `a` is each sequence's own acceptance so far, of which the latest iterations count most,
    and stays on the device.

    Unsure anchors. The draft's own row says whether the video decides its token (the peak of its
    attention) and how sure it is; before a token that is probably a wrong anchor the chain ends.

    On a CPU no further pass is run once every chain has ended.

    Args:
        cost_ratio: Of a draft step to a pass of the target; None: no adaptive length.
        confidence: Probability that an anchor needs; None: anchors are drafted like other tokens.
        anchor_threshold: Peak from which on a row is an anchor.
    """

    def __init__(
        self,
        model: Model,
        *,
        gamma: int,
        target_vocab: int,
        cost_ratio: float | None,
        confidence: float | None,
        anchor_threshold: float,
    ) -> None:
        super().__init__(model, gamma=gamma, target_vocab=target_vocab)
        self.cost_ratio, self.confidence = cost_ratio, confidence
        self.anchor_threshold = anchor_threshold
        # To look whether all chains have ended would stop a GPU.
        self._may_look = model.device.type == "cpu"

    def _make_shape(self, batch_size: int, device: torch.device) -> None:
        super()._make_shape(batch_size, device)
        self._depth = torch.zeros(1, dtype=torch.int64, device=device)
        self._ancestors = chain_ancestors(1, batch_size=batch_size, device=device)
        self._steps = torch.arange(self.gamma + 1, device=device)
        self._prior = torch.tensor(_PRIOR, device=device)
        # Accepted tokens and those that were put to the test, float32 [B, 2].
        self._counts = self._prior.repeat(batch_size, 1)

    def prefill(self, inputs: Mapping[str, Any], sequence: int) -> None:
        super().prefill(inputs, sequence)
        self._counts[sequence] = self._prior

    def lengths(self) -> Tensor:
        """int64 `[B]`: draft tokens that are worth it, from 1 to `gamma`."""
        if self.cost_ratio is None:
            return self._steps[-1:].expand(len(self._counts))
        chance = self._counts[:, :1] / self._counts[:, 1:]
        tokens = (chance**self._steps).cumsum(1)
        rate = tokens / (1 + self.cost_ratio * self._steps)
        return rate[:, 1:].argmax(1) + 1

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        cache, last_two = self.cache, state.last_two
        step = partial(self.model.step, cache=cache, scores=self.confidence is not None)
        wanted = self.lengths()
        length = torch.zeros_like(wanted)
        is_open = ~state.finished
        known = last_two.clamp(max=self.model.vocab_size - 1)
        output = read_last_two(step, known, self._own_length(target_kv_len), cache)
        tokens = last_two.new_zeros(len(last_two), self.gamma)
        for index in range(self.gamma):
            row = output.logits[:, -1:, : self._shared_vocab]
            best = ops.logit_stats(row, top_k=1, workspace=cache.workspace)
            tokens[:, index] = best.top_ids[:, 0, 0]
            is_open = is_open & (index < wanted)
            if self.confidence is not None:
                probability = (best.top_logits[:, 0, 0] - best.lse[:, 0]).exp()
                is_anchor = ~(attention_peak(output)[:, -1] < self.anchor_threshold)
                is_open = is_open & ~(is_anchor & ~(probability >= self.confidence))
            length += is_open
            if index + 1 == self.gamma or (self._may_look and not bool(is_open.any())):
                break
            cache.kv_len.add_(1)
            output = step(tokens[:, index : index + 1], self._depth, self._ancestors)
        shape = replace(self._shape, num_slots=(length + 1).int())
        return Draft(torch.cat([last_two[:, 1:], tokens], dim=1), shape)

    def commit(self, draft: Draft, acceptance: ops.Acceptance, target_kv_len: Tensor) -> None:
        accepted = acceptance.num_accepted
        tested = torch.minimum(accepted + 1, draft.shape.num_slots - 1)
        self._counts.mul_(_MEMORY).add_(torch.stack([accepted, tested], dim=1))
