"""What a draft tree may be: named and static ones, trees that grow by probability, by anchors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from lvspec.checks import check_count
from lvspec.tree import MAX_SLOTS, parents_from_paths

MAX_RANK = 15
"""A node is at most its parent's 16th choice: more are never ranked."""

MAX_BRANCHES = 16
"""Branches of a skip tree: each is chosen by operations of its own."""


def _branches(names: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, name)) for name in names.split())


NAMED_TREES: dict[str, tuple[tuple[int, ...], ...]] = {
    # SpecVLM drafts with EAGLE's tree of 25 nodes.
    "specvlm": _branches(
        "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
    ),
}
"""Static trees by name, each node by the way to it, see `lvspec.tree.parents_from_paths`."""


@dataclass(frozen=True)
class StaticTree:
    """A tree of one shape.

    Attributes:
        parents: The parent of every slot, -1 for the root; slots are ordered by depth.
        ranks: Which of its parent's choices each slot is, 0 for the best; 0 for the root.
        depths: Distance of every slot from the root.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    depths: tuple[int, ...]

    @classmethod
    def of(cls, branches: Sequence[Sequence[int]]) -> StaticTree:
        """The tree whose nodes are named by the way to them."""
        names = sorted((tuple(branch) for branch in branches), key=lambda name: (len(name), name))
        return cls(
            tuple(parents_from_paths(names).tolist()),
            (0, *(name[-1] for name in names)),
            (0, *(len(name) for name in names)),
        )


@dataclass(frozen=True)
class DynamicTree:
    """A tree of the nodes that the draft takes for the most probable, level by level.

    Args:
        width: Nodes of a level at most, those with the largest product of probabilities.
        depth: Levels below the root.
        top_k: Children that a node may have, up to 16. None: as many as a level has nodes, up to
            16.

    Raises:
        TypeError: A count is not an integer.
        ValueError: One is out of range, or the tree has more than 64 slots.
    """

    width: int
    depth: int
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_count("tree.width", self.width)
        check_count("tree.depth", self.depth)
        if self.top_k is not None:
            check_count("tree.top_k", self.top_k, most=MAX_RANK + 1)
        check_slots("tree", self.num_slots)

    @property
    def children(self) -> int:
        """Children that a node offers."""
        return self.top_k or min(self.width, MAX_RANK + 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Nodes of every level below the root."""
        levels = accumulate(
            range(self.depth), lambda nodes, _: min(self.width, nodes * self.children), initial=1
        )
        return tuple(levels)[1:]

    @property
    def num_slots(self) -> int:
        return 1 + sum(self.widths)


@dataclass(frozen=True)
class AnchorTree:
    """A chain of `gamma` tokens with other choices beside those that the video decides.

    Rows whose visual peak in the draft is at least `DecodeConfig.draft_anchor_threshold` offer
    their next best tokens; the most probable of all of them, counted from the root, are drafted.

    Args:
        siblings: Next best tokens that a row offers, up to 15.
        nodes: Such tokens in one draft at most.

    Raises:
        TypeError: A count is not an integer.
        ValueError: One is out of range.
    """

    siblings: int = 2
    nodes: int = 6

    def __post_init__(self) -> None:
        check_count("tree.siblings", self.siblings, most=MAX_RANK)
        check_count("tree.nodes", self.nodes, most=MAX_SLOTS - 2)


@dataclass(frozen=True)
class SkipTree:
    """A chain of `gamma` tokens with branches made of its own tail, at no cost for the draft.

    A branch leaves tokens of the chain out, which the draft may have inserted, and goes on behind
    them; chosen are those tokens in whose place the draft itself finds the next one most probable.
    One more branch, before these, is what was left of the chain before: where the draft had left
    out a word, the target has said it meanwhile.

    Args:
        branches: Those that leave something out, 1 to 16.
        nodes: Slots of all branches together at most.

    Raises:
        TypeError: A count is not an integer.
        ValueError: One is out of range.
    """

    branches: int = 6
    nodes: int = 36

    def __post_init__(self) -> None:
        check_count("tree.branches", self.branches, most=MAX_BRANCHES)
        check_count("tree.nodes", self.nodes, most=MAX_SLOTS - 3)


Tree = str | Sequence[Sequence[int]] | DynamicTree | AnchorTree | SkipTree
"""A named tree, the paths of a static one, or one that depends on what the draft finds."""


def check_tree(
    tree: Tree,
) -> tuple[tuple[int, ...], ...] | str | DynamicTree | AnchorTree | SkipTree:
    """The same tree, a list of paths as tuples.

    Raises:
        TypeError: It is none.
        ValueError: There is none of that name, or the paths make no tree of 2 to 64 slots.
    """
    if isinstance(tree, (DynamicTree, AnchorTree, SkipTree)):
        return tree
    if isinstance(tree, str):
        if tree not in NAMED_TREES:
            raise ValueError(f"tree: expected one of {', '.join(NAMED_TREES)}, got {tree!r}")
        return tree
    if not isinstance(tree, Sequence) or not all(isinstance(path, Sequence) for path in tree):
        raise TypeError(
            f"tree: expected a name, paths such as [(0,), (1,), (0, 0)], a DynamicTree, "
            f"an AnchorTree or a SkipTree, got {tree!r}"
        )
    paths = tuple(tuple(path) for path in tree)
    for path in paths:
        for rank in path:
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise TypeError(f"tree: expected ranks that are integers, got {rank!r} in {path}")
            if not 0 <= rank <= MAX_RANK:
                raise ValueError(f"tree: expected ranks from 0 to {MAX_RANK}, got {rank} in {path}")
    check_slots("tree", len(paths) + 1)
    try:
        parents_from_paths(paths)
    except ValueError as error:
        raise ValueError(f"tree: {error}") from None
    return paths


def check_slots(name: str, num_slots: int) -> None:
    """Raise ValueError unless a verify pass can have as many slots, and something is drafted."""
    if not 2 <= num_slots <= MAX_SLOTS:
        raise ValueError(
            f"{name}: expected 2 to {MAX_SLOTS} slots, the root included, got {num_slots}"
        )
