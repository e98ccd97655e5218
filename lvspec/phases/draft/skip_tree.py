"""A chain with branches that leave tokens of it out, made of its own tail."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvspec import ops
from lvspec.models.cache import Beginning, SlotCache
from lvspec.models.head import DraftHead
from lvspec.phases.draft.model_cache import CachedDrafter, DraftSource
from lvspec.phases.draft.passes import DraftPhase, Step, following_passes
from lvspec.phases.slots import Draft, DraftShape
from lvspec.phases.state import DecodeState
from lvspec.tree import ancestors_from_parents, chain_ancestors, chain_parents, depths
from lvspec.tree_shapes import SkipTree


class Branches(NamedTuple):
    """Branches of a chain in the order of their slots.

    Attributes:
        parent: int64 `[B, N]`, the slot that each begins behind.
        start: int64 `[B, N]`, where in the text of the draft its tokens begin.
        length: int64 `[B, N]`, how many there are; 0: there is no such branch.
    """

    parent: Tensor
    start: Tensor
    length: Tensor


class SkipTreeDrafter(CachedDrafter):
    """Drafts a greedy chain, and branches that go on behind tokens left out of it.

    The chain stands in the slots 0 to `gamma`, the branches behind it. Its *text* is the chain and
    behind it what was left of the text before. No pass of the draft reads a branch: what was
    accepted of one is read when the next draft begins, in the pass over the root.

    Args:
        gamma: Tokens of the chain, >= 2.
    """

    def __init__(self, source: DraftSource, tree: SkipTree, *, gamma: int) -> None:
        # No branch is longer than a chain, and behind it stands the root.
        self._most_unread = min(gamma, tree.nodes) + 1
        super().__init__(source, gamma=gamma + tree.nodes, pass_slots=self._most_unread)
        self._chain, self.tree = gamma, tree

    @property
    def depth(self) -> int:
        return self._chain

    def _make_shape(self, batch_size: int, device: torch.device) -> None:
        gamma, slots = self._chain, self._chain + 1
        self._parents = chain_parents(slots, batch_size=batch_size, device=device)
        self._slots = torch.arange(self.gamma + 1, device=device)
        self._unread = torch.ones(batch_size, dtype=torch.int32, device=device)
        self._left = torch.zeros(batch_size, gamma, dtype=torch.int64, device=device)
        self._num_left = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def prefill(
        self,
        inputs: Mapping[str, Any] | None,
        sequence: int,
        *,
        prompt: Tensor,
        target_cache: SlotCache,
        beginning: Beginning | None = None,
    ) -> None:
        kept = {"prompt": prompt, "target_cache": target_cache, "beginning": beginning}
        super().prefill(inputs, sequence, **kept)
        self._unread[sequence], self._num_left[sequence] = 1, 0

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        chain, scores = self._draft(state, target_kv_len)
        count = num_until_end(chain, state.eos_ids)
        branches = what_was_left(chain, self._left, self._num_left)
        branches = with_best(branches, chain, count, scores, self.tree.branches)
        parents, places, num_slots = in_slots(branches, self._chain, self.tree.nodes)
        self._text = torch.cat([chain, self._left], dim=1)
        self._ends = torch.stack([count, self._chain + self._num_left], dim=1)
        self._places = torch.cat([self._slots[: self._chain].expand_as(chain), places], dim=1)
        tokens = torch.cat([state.last_two[:, 1:], self._text.gather(1, self._places)], dim=1)
        parents = torch.cat([self._parents, parents], dim=1)
        shape = DraftShape(
            parents,
            ancestors_from_parents(parents),
            depths(parents).long(),
            num_slots,
            is_chain=False,
        )
        return Draft(tokens, shape)

    def _draft(self, state: DecodeState, target_kv_len: Tensor) -> tuple[Tensor, Tensor]:
        """The chain, and the scores of its tokens, see `SkippingChain`."""
        return self._run(
            SkippingChain(self.head, self._chain), self._begin(state, target_kv_len), target_kv_len
        )

    def _begin(self, state: DecodeState, target_kv_len: Tensor) -> Tensor:
        """int64 `[B, n]`: tokens without rows in the cache, which is set to where the first stands.

        Behind the last of them is scratch.
        """
        offsets = self._slots[: self._most_unread]
        columns = state.num_out[:, None] - self._unread[:, None] + offsets
        own_length = self._own_length(target_kv_len)
        self.cache.kv_len.copy_((own_length + 1 - self._unread).clamp(min=0))
        return state.out_ids.gather(1, columns.clamp(min=0).long()).clamp(min=0)

    def commit(self, draft: Draft, acceptance: ops.Acceptance, target_kv_len: Tensor) -> None:
        """Rows of the chain stand where they belong; those behind them are to be read.

        The row of its last token no pass has written.
        """
        accepted = acceptance.num_accepted
        stands = (acceptance.path == self._slots) & (self._slots < self._chain)
        self._unread.copy_(accepted + 2 - stands.sum(1, dtype=torch.int32))

        last = acceptance.path.gather(1, accepted[:, None].long()).long()
        behind = torch.where(last > 0, self._places.gather(1, (last - 1).clamp(min=0)) + 1, 0)
        chain_end, end = self._ends.split(1, dim=1)
        end = torch.where(behind <= self._chain, chain_end, end)
        columns = (behind + self._slots[: self._chain]).clamp(max=2 * self._chain - 1)
        self._left.copy_(self._text.gather(1, columns))
        self._num_left.copy_((end - behind).clamp(min=0)[:, 0])


def num_until_end(chain: Tensor, eos_ids: Tensor) -> Tensor:
    """int64 `[B]`: tokens of a chain up to the first that ends a sequence, or all."""
    is_end = (chain[..., None] == eos_ids).any(-1).long()
    return (is_end.cumsum(1) - is_end == 0).sum(1)


def what_was_left(chain: Tensor, left: Tensor, num_left: Tensor) -> Branches:
    """The branch of what was left of the chain before, from where this chain is another: `[B, 1]`.

    Args:
        chain, left: int64 `[B, gamma]`.
        num_left: int64 `[B]`, how many tokens of `left` count.
    """
    gamma = chain.shape[1]
    is_left = torch.arange(gamma, device=chain.device) < num_left[:, None]
    common = ((chain == left) & is_left).long().cumprod(1).sum(1, keepdim=True)
    return Branches(common, common + gamma, num_left[:, None] - common)


def with_best(
    before: Branches, chain: Tensor, count: Tensor, scores: Tensor, most: int
) -> Branches:
    """Behind other branches those that leave tokens of the chain out, the most probable first.

    A branch leaves out what an earlier one does, or the chain, and one token behind that. It is as
    probable as the least probable of its tokens is left out: where two are doubtful there are
    branches without either and one without both, before any without a third. Of equal ones the one
    that leaves out more comes first, if what it begins within is there already.

    Args:
        before: The others, `[B, N]`.
        chain: int64 `[B, gamma]`.
        count: int64 `[B]`, how many of its tokens count.
        scores: `[B, gamma - 1]`, log-probability of the next token where each stands.
        most: How many are wanted.

    Returns:
        `[B, N + most]`.
    """
    batch_size, places = scores.shape
    place = torch.arange(places, device=chain.device)
    makes_none = (chain[:, 1:] == chain[:, :-1]) | (place + 1 >= count[:, None])
    scores = scores.nan_to_num(nan=-math.inf, neginf=-math.inf).masked_fill(makes_none, -math.inf)
    # What may be branched from, the latest first: how probable it is, where its own tokens begin,
    # the slot above them, and what to add to the place of a token for its slot. First the chain.
    value = torch.full_like(scores[:, :1], math.inf)
    start, above = torch.zeros_like(chain[:, :1]), torch.zeros_like(chain[:, :1])
    shift, is_used = torch.ones_like(start), torch.zeros_like(scores, dtype=torch.bool)[:, None]
    end = before.length.sum(1, keepdim=True) + places + 2  # a chain has a token more, and a root
    parts = [before]
    for _ in range(most):
        found = torch.minimum(value[..., None], scores[:, None])
        found = found.masked_fill((place < start[..., None]) | is_used, -math.inf)
        best, way = found.flatten(1).max(1, keepdim=True)
        origin, left_out = way // places, way % places
        is_used = is_used.flatten(1).scatter(1, way, True).view_as(is_used)
        begin, first = left_out + 1, start.gather(1, origin)
        parent = torch.where(
            left_out == first, above.gather(1, origin), shift.gather(1, origin) + left_out - 1
        )
        length = (count[:, None] - begin).masked_fill(best == -math.inf, 0)
        parts.append(Branches(parent, begin, length))
        value, start = torch.cat([best, value], dim=1), torch.cat([begin, start], dim=1)
        above = torch.cat([parent, above], dim=1)
        shift = torch.cat([end - begin, shift], dim=1)
        is_used = torch.cat([torch.zeros_like(is_used[:, :1]), is_used], dim=1)
        end = end + length
    return Branches(*(torch.cat(each, dim=1) for each in zip(*parts, strict=True)))


def in_slots(branches: Branches, gamma: int, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Branches in the slots behind a chain of `gamma` tokens, one after the other.

    Returns:
        parents int32 and places in the text int64, `[B, nodes]`, and int32 `[B]`: the slots of
        chain and branches. A branch that does not fit is cut, and what is behind them is padding.
    """
    ends = branches.length.cumsum(1)
    slots = torch.arange(nodes, device=ends.device)
    branch = (ends[:, None, :] <= slots[:, None]).sum(-1).clamp(max=ends.shape[1] - 1)
    within = slots - (ends - branches.length).gather(1, branch)
    parents = torch.where(within == 0, branches.parent.gather(1, branch), gamma + slots)
    source = (branches.start.gather(1, branch) + within).clamp(max=2 * gamma - 1)
    num_slots = ends[:, -1].clamp(max=nodes) + gamma + 1
    return parents.int(), source, num_slots.int()


class SkippingChain(DraftPhase):
    """A greedy chain, and what the draft thinks of leaving its tokens out.

    Begins with tokens of which the cache has no rows yet, the first of which stands at the cache's
    `kv_len` and the last at `own_length`; those behind it are scratch, and so are their rows.

    int64 `[B, gamma]` and `[B, gamma - 1]`: of every token but the last, the log-probability of the
    one behind it where it stands.
    """

    def __init__(self, head: DraftHead, gamma: int) -> None:
        super().__init__(head)
        self.gamma = gamma

    def run(
        self, step: Step, unread: Tensor, own_length: Tensor, cache: SlotCache
    ) -> tuple[Tensor, Tensor]:
        rows, found, tokens = [self._first_row(step, unread, own_length, cache)], [], []
        passes = following_passes(step, cache, tokens)
        while True:
            found.append(ops.logit_stats(rows[-1], top_k=1, workspace=cache.workspace))
            tokens.append(self.head.ids(found[-1].top_ids[..., 0]))
            if len(tokens) == self.gamma:
                break
            rows.append(next(passes).logits)
        return self._found(torch.cat(tokens, dim=1), rows, found)

    def _found(
        self, tokens: Tensor, rows: list[Tensor], found: list[ops.LogitStats]
    ) -> tuple[Tensor, Tensor]:
        """What is returned of a chain, each row of which chose a token."""
        skipped = [
            row.gather(-1, following.top_ids.long())[..., 0] - best.lse
            for row, best, following in zip(rows, found, found[1:], strict=False)
        ]
        return tokens, torch.cat(skipped, dim=1)

    def _first_row(
        self, step: Step, unread: Tensor, own_length: Tensor, cache: SlotCache
    ) -> Tensor:
        """`[B, 1, V]`: the row of the root; `kv_len` is `own_length` afterwards."""
        batch_size, count = unread.shape
        index = (own_length - cache.kv_len).clamp(0, count - 1).long()
        ancestors = chain_ancestors(count, batch_size=batch_size, device=unread.device)
        rows = step(unread, torch.arange(count, device=unread.device), ancestors).logits
        cache.kv_len.copy_(own_length)
        return rows.gather(1, index[:, None, None].expand(-1, 1, rows.shape[2]))
