"""A draft that says what the draft of a pair says, but for words inserted, left out or swapped.

The draft drafts as it does, and what it says is changed before anything is made of it, so that it
goes on behind a word as if that had not been changed. Its probabilities are changed alike: in a row
where it says another word, that has `margin` nats more than the best of the others. Which rows are
changed depends on the position in the output and on the token before alone. Rows of its cache
behind a change are read anew, when it is known what was accepted, so what it drafts from is always
the text that was committed.

Changes are made by the host: this is for measurements on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

import lvspec.engine.decoder
from lvspec import ops
from lvspec.models.loading import Pair
from lvspec.phases.draft import CachedDrafter, Drafter, SkipTreeDrafter
from lvspec.phases.draft.skip_tree import SkippingChain
from lvspec.phases.slots import Draft
from lvspec.phases.state import DecodeState
from lvspec.shapes.captions import anchor_words
from lvspec.tree_shapes import SkipTree

Kind = Literal["inserted", "left out", "swapped"]
KINDS: tuple[Kind, ...] = ("inserted", "left out", "swapped")
ADVERBS = (
    *("slowly", "steadily", "smoothly", "gently", "calmly"),
    *("quietly", "clearly", "simply", "visibly", "rather", "quite", "fairly"),
)
_PUNCTUATION = (".", ",", "?")

Said = tuple[int, int, bool]
"""A token, the row that it is said in, and whether that row is changed for it."""


@dataclass(frozen=True)
class Shifts:
    """How a draft differs from that of the pair.

    Attributes:
        kind: What happens to words. No word that the video decides is left out or swapped.
        adverbs: Ids of what is inserted, the one that the draft finds most probable.
        fixed: Ids of what is neither left out nor swapped.
        every: One of so many rows is changed, as far as its word may be.
        margin: Nats by which what is said there is more probable than anything else.
    """

    kind: Kind
    adverbs: tuple[int, ...]
    fixed: frozenset[int]
    every: int = 6
    margin: float = 1.0

    @classmethod
    def of_embedded(cls, pair: Pair, kind: Kind, *, every: int = 6, margin: float = 1.0) -> Shifts:
        """Those of the embedded pair's words."""
        vocabulary = pair.processor.tokenizer.get_vocab()
        names = {name.strip(): id_ for name, id_ in vocabulary.items()}
        ends = [id_ for name, id_ in vocabulary.items() if name.startswith("<")]
        fixed = frozenset([*(names[word] for word in (*anchor_words(), *_PUNCTUATION)), *ends])
        return cls(kind, tuple(names[word] for word in ADVERBS), fixed, every, margin)

    def is_changed(self, position: int, token: int) -> bool:
        """Whether the row behind a token at this position in the output is changed."""
        mixed = (position * 7919 + token * 104729 + 12345) * 2654435761 % 2**31
        return (mixed >> 7) % self.every == 0

    def said(self, root: int, position: int, clean: list[int], adverbs: list[int]) -> list[Said]:
        """What is said in place of a chain, as long as that is enough for it.

        Args:
            root: The token before the chain.
            position: Its position in the output.
            clean: What the draft says. Row r is the one of `clean[r]`.
            adverbs: The most probable one in every row.
        """
        said: list[Said] = []
        before, row = root, 0
        while row < len(clean):
            token, can_change = clean[row], self.is_changed(position + len(said), before)
            if can_change and self.kind == "inserted" and before not in self.adverbs:
                said.append((adverbs[row], row, True))
            elif can_change and self.kind != "inserted" and row + 1 < len(clean):
                second = clean[row + 1]
                if self.kind == "left out" and token not in self.fixed:
                    said.append((second, row, True))
                    row += 2
                elif self.kind == "swapped" and self.fixed.isdisjoint((token, second)):
                    said += [(second, row, True), (token, row + 1, True)]
                    row += 2
                else:
                    said.append((token, row, False))
                    row += 1
            else:
                said.append((token, row, False))
                row += 1
            before = said[-1][0]
        return said


class ShiftedDrafter(SkipTreeDrafter):
    """A drafter that speaks like this: of a skip tree, or without a tree of a chain."""

    def __init__(self, drafter: CachedDrafter, shifts: Shifts) -> None:
        self.has_branches = isinstance(drafter, SkipTreeDrafter)
        tree = drafter.tree if self.has_branches else SkipTree(1, 1)
        super().__init__(drafter._source, tree, gamma=drafter.depth)
        self.shifts, self._most_unread = shifts, self.depth + 1
        self._clean = self.depth + self.depth // 2 + 1
        if not self.has_branches:
            self.gamma = self.depth

    def allocate(self, *, batch_size: int, capacity: int) -> None:
        super().allocate(batch_size=batch_size, capacity=capacity + self._clean)

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        draft = super().propose(state, target_kv_len)
        if self.has_branches:
            return draft
        shape, slots = draft.shape, self.gamma + 1
        parts = (x[:, :slots] for x in (shape.parents, shape.ancestors, shape.depths))
        shape = type(shape)(*parts, torch.full_like(shape.num_slots, slots), is_chain=True)
        return replace(draft, tokens=draft.tokens[:, :slots], shape=shape)

    def _draft(self, state: DecodeState, target_kv_len: Tensor) -> tuple[Tensor, Tensor]:
        clean, rows = self._run(
            _Rows(self.head, self._clean), self._begin(state, target_kv_len), target_kv_len
        )
        adverbs = torch.tensor(self.shifts.adverbs)
        best_adverbs = adverbs[rows[..., adverbs].argmax(-1)].tolist()
        roots, positions = state.last_two[:, 1].tolist(), (state.num_out - 1).tolist()
        given = zip(roots, positions, clean.tolist(), best_adverbs, strict=True)
        said = [self.shifts.said(*each)[: self.depth] for each in given]
        tokens, row, is_changed = (
            torch.tensor([[word[part] for word in each] for each in said]) for part in range(3)
        )
        self._num_same = (~is_changed).int().cumprod(1).sum(1, dtype=torch.int32)
        rows = rows.gather(1, row[..., None].expand(-1, -1, rows.shape[2]))
        best = rows.amax(-1, keepdim=True) + self.shifts.margin
        rows = torch.where(is_changed[..., None], rows.scatter(-1, tokens[..., None], best), rows)
        return tokens, rows[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]

    def commit(self, draft: Draft, acceptance: ops.Acceptance, target_kv_len: Tensor) -> None:
        super().commit(draft, acceptance, target_kv_len)
        behind = acceptance.num_accepted + 1 - self._num_same  # rows behind a change do not stand
        self._unread.copy_(torch.maximum(self._unread, behind))


class _Rows(SkippingChain):
    """int64 `[B, gamma]` and `[B, gamma, V]`: a greedy chain and the rows that it was chosen in."""

    def _found(self, tokens: Tensor, rows: list[Tensor], found: list) -> tuple[Tensor, Tensor]:
        return tokens, torch.cat(rows, dim=1)


@contextmanager
def shifted(shifts: Shifts | None) -> Iterator[None]:
    """Within this context a new `Decoder` with a draft model has such a draft; None: its own."""
    plain = lvspec.engine.decoder.make_drafter

    def make_drafter(*arguments: object) -> Drafter:
        drafter = plain(*arguments)
        if shifts is not None and isinstance(drafter, CachedDrafter):
            return ShiftedDrafter(drafter, shifts)
        return drafter

    lvspec.engine.decoder.make_drafter = make_drafter
    try:
        yield
    finally:
        lvspec.engine.decoder.make_drafter = plain
