"""Shapes of drafts: parents, depths, ancestor bits and paths.

Slot 0 is the root; the parent of any other slot stands before it, so slots are in topological
order. A chain is the tree `[-1, 0, 1, ...]`. The functions on tensors read nothing back from the
device.

Worked example, the tree used throughout the tests::

    slot      0   1   2   3   4   5
    parent   -1   0   0   1   1   2            0
    depth     0   1   1   2   2   2          1   2
    ancestors 1   3   5  11  19  37         3 4  5
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

MAX_SLOTS = 64
"""Slots of one verify pass at most: ancestors are the bits of one int64."""


def chain_parents(
    num_slots: int, *, batch_size: int | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """Parents of a chain: int32 `[num_slots]`, or `[batch_size, num_slots]` if that is given."""
    _check_num_slots(num_slots)
    parents = torch.arange(-1, num_slots - 1, dtype=torch.int32, device=device)
    return parents if batch_size is None else parents.repeat(batch_size, 1)


def chain_ancestors(
    num_slots: int, *, batch_size: int | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """Ancestors of a chain, int64 like its parents in shape: slot t has the bits 0 to t."""
    _check_num_slots(num_slots)
    # The bits are disjoint, so their sum is their union; bit 63 included, for int64 wraps around.
    ancestors = _own_bits(num_slots, device).cumsum(0)
    return ancestors if batch_size is None else ancestors.repeat(batch_size, 1)


def ancestors_from_parents(parents: torch.Tensor) -> torch.Tensor:
    """Bits of every slot's ancestors and of itself.

    Args:
        parents: integers `[..., S]`, `1 <= S <= 64`. Anything below 0 counts as the root.

    Returns:
        int64 `[..., S]`: bit j of entry t is set iff slot j is t or an ancestor of t. Bit 63 makes
        it negative.
    """
    num_slots = parents.shape[-1]
    _check_num_slots(num_slots)
    jump = parents.long().clamp(min=0)
    bits = _own_bits(num_slots, parents.device).expand(parents.shape)
    # Pointer doubling: after k rounds every slot knows 2^k levels, and the root, its own parent
    # here, absorbs the rest.
    for _ in range((num_slots - 1).bit_length()):
        bits = bits | bits.gather(-1, jump)
        jump = jump.gather(-1, jump)
    return bits.contiguous()


def depths(parents: torch.Tensor) -> torch.Tensor:
    """Distance of every slot from the root: int32 `[..., S]` for integers `[..., S]`."""
    num_slots = parents.shape[-1]
    _check_num_slots(num_slots)
    jump = parents.long().clamp(min=0)
    depth = (torch.arange(num_slots, device=parents.device) > 0).int().expand(parents.shape)
    for _ in range((num_slots - 1).bit_length()):
        depth = depth + depth.gather(-1, jump)
        jump = jump.gather(-1, jump)
    return depth.contiguous()


def paths(parents: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """The paths from the root to every leaf, the field's *retrieve indices*.

    Args:
        parents: one tree, `[S]`. Read on the host: this is for building a static tree once.

    Returns:
        int32 `[leaves, deepest + 1]` on the CPU: slots, padded with -1; leaves in slot order.
    """
    parent_list = _as_list(parents)
    validate_tree(parent_list)
    inner = set(parent_list)
    rows = []
    for leaf in range(len(parent_list)):
        if leaf not in inner:
            row = [leaf]
            while row[-1] > 0:
                row.append(parent_list[row[-1]])
            rows.append(row[::-1])
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows], dtype=torch.int32)


def parents_from_paths(branches: Sequence[Sequence[int]]) -> torch.Tensor:
    """Parents of the tree whose nodes are named by the way to them (Medusa's *choices*).

    Args:
        branches: one entry a node except the root, such as `(0,)`, `(1,)`, `(0, 2)`: the last
            number says which of its parent's candidates the node is, by rank. Every prefix of an
            entry must be an entry.

    Returns:
        int32 `[len(branches) + 1]`. Slots are ordered by depth, then by name.

    Raises:
        ValueError: An entry is empty or repeated, or its parent is missing.
    """
    names = sorted((tuple(branch) for branch in branches), key=lambda name: (len(name), name))
    slot_of: dict[tuple[int, ...], int] = {(): 0}
    parents = [-1]
    for name in names:
        if name in slot_of:  # the root has the empty name
            problem = f"{name} twice" if name else "an empty one"
            raise ValueError(f"branches: expected non-empty, distinct entries, got {problem}")
        if name[:-1] not in slot_of:
            raise ValueError(
                f"branches: expected the parent {name[:-1]} of {name} as an entry, got none"
            )
        slot_of[name] = len(parents)
        parents.append(slot_of[name[:-1]])
    _check_num_slots(len(parents))
    return torch.tensor(parents, dtype=torch.int32)


def validate_tree(parents: torch.Tensor | Sequence[int]) -> None:
    """Raise ValueError unless every row of `parents` is a tree whose parents stand before children.

    Args:
        parents: integers `[S]` or `[B, S]`, read on the host.
    """
    values = _as_list(parents)
    rows = values if values and isinstance(values[0], list) else [values]
    for row in rows:
        _check_num_slots(len(row))
        if row[0] != -1:
            raise ValueError(f"parents: expected -1 for slot 0, the root, got {row[0]}")
        for slot, parent in enumerate(row[1:], start=1):
            if not 0 <= parent < slot:
                raise ValueError(
                    f"parents: expected a slot from 0 to {slot - 1} for slot {slot}, got {parent}"
                )


def _own_bits(num_slots: int, device: torch.device | str | None) -> torch.Tensor:
    slots = torch.arange(num_slots, dtype=torch.int64, device=device)
    return torch.bitwise_left_shift(torch.ones_like(slots), slots)


def _as_list(parents: torch.Tensor | Sequence[int]) -> list:
    return parents.tolist() if isinstance(parents, torch.Tensor) else list(parents)


def _check_num_slots(num_slots: int) -> None:
    if not 1 <= num_slots <= MAX_SLOTS:
        raise ValueError(f"num_slots: expected 1 to {MAX_SLOTS}, got {num_slots}")
