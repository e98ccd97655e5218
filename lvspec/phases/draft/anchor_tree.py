"""A chain with other choices beside the tokens that the video decides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvspec import ops
from lvspec.models.cache import SlotCache
from lvspec.models.head import DraftHead
from lvspec.phases.draft.model_cache import CachedDrafter, DraftSource
from lvspec.phases.draft.passes import DraftPhase, Step, chain_passes
from lvspec.phases.relevance import attention_peak
from lvspec.phases.slots import Draft, DraftShape
from lvspec.phases.state import DecodeState
from lvspec.tree import chain_ancestors, chain_parents
from lvspec.tree_shapes import AnchorTree


class AnchorTreeDrafter(CachedDrafter):
    """Drafts a greedy chain, and leaves beside it where the draft looks at the video.

    The chain stands in the slots 0 to `depth`, the leaves behind it, the most probable first;
    where there are fewer than the tree has room for, the rest is padding.

    Args:
        gamma: Tokens of the chain.
        anchor_threshold: Peak from which on a row of the draft is an anchor.
    """

    def __init__(
        self, source: DraftSource, tree: AnchorTree, *, gamma: int, anchor_threshold: float
    ) -> None:
        leaves = min(tree.nodes, gamma * tree.siblings)
        super().__init__(source, gamma=gamma + leaves, pass_slots=gamma + leaves + 1)
        self._chain, self.siblings, self.leaves = gamma, tree.siblings, leaves
        self.anchor_threshold = anchor_threshold

    @property
    def depth(self) -> int:
        return self._chain

    def _make_shape(self, batch_size: int, device: torch.device) -> None:
        slots = self.depth + 1
        self._parents = chain_parents(slots, batch_size=batch_size, device=device)
        self._ancestors = chain_ancestors(slots, batch_size=batch_size, device=device)
        self._depths = torch.arange(slots, device=device).repeat(batch_size, 1)
        leaves = torch.arange(slots, slots + self.leaves, device=device)
        self._own_bits = torch.bitwise_left_shift(torch.ones_like(leaves), leaves)

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        choices, log_probs, peaks = self._run(
            _ScoredChain(self.head, self.depth, self.siblings), state.last_two, target_kv_len
        )
        others = log_probs[..., 1:] + (log_probs[..., :1].cumsum(1) - log_probs[..., :1])
        is_anchor = ~(peaks < self.anchor_threshold)
        others = others.masked_fill(~is_anchor[..., None], -math.inf).nan_to_num(
            nan=-math.inf, neginf=-math.inf
        )
        best, order = others.flatten(1).sort(dim=1, descending=True, stable=True)
        best, order = best[:, : self.leaves], order[:, : self.leaves]
        row = order // self.siblings  # row and slot of a chain are the same
        leaves = choices[..., 1:].flatten(1).gather(1, order)
        shape = DraftShape(
            torch.cat([self._parents, row.int()], dim=1),
            torch.cat([self._ancestors, self._ancestors.gather(1, row) | self._own_bits], dim=1),
            torch.cat([self._depths, row + 1], dim=1),
            (best > -math.inf).sum(1, dtype=torch.int32) + (self.depth + 1),
            is_chain=False,
        )
        return Draft(torch.cat([state.last_two[:, 1:], choices[..., 0], leaves], dim=1), shape)


class _ScoredChain(DraftPhase):
    """A greedy chain: of every row the best tokens, their log-probabilities, and the peak.

    int64 and float32 `[B, gamma, 1 + siblings]`, float32 `[B, gamma]`.
    """

    scores = True

    def __init__(self, head: DraftHead, gamma: int, siblings: int) -> None:
        super().__init__(head)
        self.gamma, self.siblings = gamma, siblings

    def run(
        self, step: Step, last_two: Tensor, own_length: Tensor, cache: SlotCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, choices, log_probs, peaks = [], [], [], []
        for output in chain_passes(step, last_two, own_length, cache, tokens):
            row = output.logits[:, -1:]
            best = ops.logit_stats(row, top_k=1 + self.siblings, workspace=cache.workspace)
            choices.append(self.head.ids(best.top_ids))
            log_probs.append(best.top_logits - best.lse[..., None])
            peaks.append(attention_peak(output)[:, -1:])
            tokens.append(choices[-1][..., 0])
            if len(tokens) == self.gamma:
                break
        return tuple(torch.cat(parts, dim=1) for parts in (choices, log_probs, peaks))
