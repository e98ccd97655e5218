"""A small model proposes a tree: a static one, or one of the most probable nodes.

A level is drafted by a pass over the slots above it. Such a pass writes the same rows anew with
what they held, and its shape is static. `gamma` are the slots behind the root, `depth` the levels
below it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lvspec import ops
from lvspec.models.cache import SlotCache
from lvspec.models.head import DraftHead
from lvspec.phases.draft.model_cache import CachedDrafter, DraftSource
from lvspec.phases.draft.passes import DraftPhase, Step, read_last_two
from lvspec.phases.slots import Draft, DraftShape
from lvspec.phases.state import DecodeState
from lvspec.tree import ancestors_from_parents
from lvspec.tree_shapes import DynamicTree, StaticTree


class StaticTreeDrafter(CachedDrafter):
    """Drafts a tree that is always the same: every node is its parent's choice of a given rank."""

    def __init__(self, source: DraftSource, tree: StaticTree) -> None:
        slots = len(tree.parents)
        super().__init__(source, gamma=slots - 1, pass_slots=slots)
        self.tree = tree

    @property
    def depth(self) -> int:
        return max(self.tree.depths)

    def _make_shape(self, batch_size: int, device: torch.device) -> None:
        parents = torch.tensor(self.tree.parents, dtype=torch.int32, device=device)
        parents = parents.repeat(batch_size, 1)
        self._shape = DraftShape(
            parents,
            ancestors_from_parents(parents),
            torch.tensor(self.tree.depths, device=device),
            torch.full((batch_size,), self.gamma + 1, dtype=torch.int32, device=device),
            is_chain=False,
        )
        self._levels = _levels(self.tree, device)

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        proposed = self._run(
            _StaticTree(self.head, self._levels, self._shape), state.last_two, target_kv_len
        )
        return Draft(torch.cat([state.last_two[:, 1:], proposed], dim=1), self._shape)


class DynamicTreeDrafter(CachedDrafter):
    """Drafts on every level the nodes with the largest product of the draft's probabilities."""

    def __init__(self, source: DraftSource, tree: DynamicTree) -> None:
        super().__init__(source, gamma=tree.num_slots - 1, pass_slots=tree.num_slots)
        self.tree = tree

    @property
    def depth(self) -> int:
        return self.tree.depth

    def _make_shape(self, batch_size: int, device: torch.device) -> None:
        widths = enumerate((1, *self.tree.widths))
        depths = [depth for depth, width in widths for _ in range(width)]
        self._depths = torch.tensor(depths, device=device)
        slots = self.tree.num_slots
        self._num_slots = torch.full((batch_size,), slots, dtype=torch.int32, device=device)

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        proposed, parents, ancestors = self._run(
            _DynamicTree(self.head, self.tree, self._depths), state.last_two, target_kv_len
        )
        shape = DraftShape(parents, ancestors, self._depths, self._num_slots, is_chain=False)
        return Draft(torch.cat([state.last_two[:, 1:], proposed], dim=1), shape)


_Level = tuple[int, int, int, Tensor]
"""Of a level: its first parent, the slot behind its last one, choices ranked, and which of all
parents' choices its nodes are."""


def _levels(tree: StaticTree, device: torch.device) -> list[_Level]:
    levels = []
    for depth in range(1, max(tree.depths) + 1):
        nodes = [slot for slot, of in enumerate(tree.depths) if of == depth]
        first, last = tree.parents[nodes[0]], tree.parents[nodes[-1]]
        count = max(tree.ranks[node] for node in nodes) + 1
        choices = [(tree.parents[node] - first) * count + tree.ranks[node] for node in nodes]
        levels.append((first, last + 1, count, torch.tensor(choices, device=device)))
    return levels


class _StaticTree(DraftPhase):
    """int64 `[B, S - 1]`: the tokens behind the root."""

    def __init__(self, head: DraftHead, levels: list[_Level], shape: DraftShape) -> None:
        super().__init__(head)
        self.levels, self.depths, self.ancestors = levels, shape.depths, shape.ancestors

    def run(self, step: Step, last_two: Tensor, own_length: Tensor, cache: SlotCache) -> Tensor:
        rows = read_last_two(step, last_two, own_length, cache).logits[:, 1:]
        tokens = last_two[:, 1:]
        for first, end, count, chosen in self.levels:
            if first > 0:
                passed = step(tokens[:, :end], self.depths[:end], self.ancestors[:, :end])
                rows = passed.logits[:, first:]
            best = ops.logit_stats(rows, top_k=count, workspace=cache.workspace).top_ids
            tokens = torch.cat([tokens, self.head.ids(best.flatten(1)[:, chosen])], dim=1)
        return tokens[:, 1:]


class _DynamicTree(DraftPhase):
    """Tokens behind the root `[B, S - 1]`, parents and ancestors `[B, S]`."""

    def __init__(self, head: DraftHead, tree: DynamicTree, depths: Tensor) -> None:
        super().__init__(head)
        self.widths, self.children, self.depths = tree.widths, tree.children, depths

    def run(
        self, step: Step, last_two: Tensor, own_length: Tensor, cache: SlotCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = read_last_two(step, last_two, own_length, cache).logits[:, 1:]
        tokens = last_two[:, 1:]
        parents = torch.full_like(tokens, -1, dtype=torch.int32)
        ancestors = torch.ones_like(tokens)
        slots = torch.zeros_like(parents)
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        log_probs = torch.zeros_like(tokens, dtype=wide)
        ends = [sum(self.widths[:level], 1) for level in range(len(self.widths) + 1)]
        for level, (first, end) in enumerate(pairwise(ends)):
            if level > 0:
                above = slice(first - self.widths[level - 1], first)
                passed = step(tokens, self.depths[:first], ancestors)
                rows = passed.logits[:, above]
            nodes = ops.expand_tree(
                rows,
                log_probs,
                slots,
                width=end - first,
                top_k=self.children,
                workspace=cache.workspace,
            )
            slots = torch.arange(first, end, dtype=torch.int32, device=tokens.device)
            slots, log_probs = slots.repeat(len(tokens), 1), nodes.log_probs
            own_bits = torch.bitwise_left_shift(torch.ones_like(slots, dtype=torch.int64), slots)
            above = ancestors.gather(1, nodes.parents.long())
            tokens = torch.cat([tokens, self.head.ids(nodes.tokens)], dim=1)
            parents = torch.cat([parents, nodes.parents], dim=1)
            ancestors = torch.cat([ancestors, above | own_bits], dim=1)
        return tokens[:, 1:], parents, ancestors
