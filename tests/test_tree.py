"""Trees of drafts against climbing from every slot to the root."""

import random

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lvspec import tree

PARENTS = [-1, 0, 0, 1, 1, 2]  # the tree of the module's documentation


def random_parents(num_slots):
    return [-1] + [random.randrange(t) for t in range(1, num_slots)]


def climb(parents, slot):
    """Slots from `slot` up to the root."""
    way = [slot]
    while way[-1] > 0:
        way.append(parents[way[-1]])
    return way


def test_worked_example():
    parents = torch.tensor(PARENTS)
    assert tree.ancestors_from_parents(parents).tolist() == [1, 3, 5, 11, 19, 37]
    assert tree.depths(parents).tolist() == [0, 1, 1, 2, 2, 2]
    assert tree.paths(parents).tolist() == [[0, 1, 3], [0, 1, 4], [0, 2, 5]]


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4, 5, 8, 9, 31, 33, 63, 64])
def test_climbing(num_slots):
    batch = [random_parents(num_slots) for _ in range(7)] + [list(range(-1, num_slots - 1))]
    parents = torch.tensor(batch, dtype=torch.int32)
    ancestors, depths = tree.ancestors_from_parents(parents), tree.depths(parents)
    assert ancestors.dtype == torch.int64 and depths.dtype == torch.int32
    for b, row in enumerate(batch):
        for t in range(num_slots):
            way = climb(row, t)
            assert ancestors[b, t].item() % 2**64 == sum(1 << slot for slot in way)
            assert depths[b, t] == len(way) - 1
        assert torch.equal(ancestors[b], tree.ancestors_from_parents(parents[b]))
        assert torch.equal(depths[b], tree.depths(parents[b]))


@pytest.mark.parametrize("num_slots", [1, 2, 17, 63, 64])
def test_chain(num_slots):
    parents = tree.chain_parents(num_slots)
    assert parents.tolist() == list(range(-1, num_slots - 1)) and parents.dtype == torch.int32
    ancestors = tree.chain_ancestors(num_slots)
    assert torch.equal(ancestors, tree.ancestors_from_parents(parents))
    batch = tree.chain_parents(num_slots, batch_size=3)
    assert batch.is_contiguous() and torch.equal(batch, parents.expand(3, -1))
    assert torch.equal(tree.chain_ancestors(num_slots, batch_size=3), ancestors.expand(3, -1))


def test_bit_63_is_the_sign():
    assert tree.chain_ancestors(64)[63] == -1
    star = torch.tensor([-1] + [0] * 63)
    assert tree.ancestors_from_parents(star)[63] == -(2**63) + 1


@pytest.mark.parametrize("num_slots", [1, 2, 9, 64])
def test_paths_lead_to_the_leaves(num_slots):
    parents = random_parents(num_slots)
    leaves = [t for t in range(num_slots) if t not in parents[1:]]
    rows = tree.paths(parents).tolist()
    assert [[slot for slot in row if slot >= 0] for row in rows] == [
        climb(parents, leaf)[::-1] for leaf in leaves
    ]
    assert any(row[-1] >= 0 for row in rows)


def test_parents_from_paths():
    branches = [(1, 0), (0,), (0, 2), (1,), (0, 0)]
    # Slots: (0,) 1, (1,) 2, (0, 0) 3, (0, 2) 4, (1, 0) 5.
    assert tree.parents_from_paths(branches).tolist() == PARENTS
    assert tree.parents_from_paths([]).tolist() == [-1]


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ([(0,), (0,)], r"got \(0,\) twice"),
        ([(0,), ()], "got an empty one"),
        ([(0,), (1, 0)], r"expected the parent \(1,\) of \(1, 0\)"),
        ([(rank,) for rank in range(64)], "num_slots: expected 1 to 64, got 65"),
    ],
)
def test_branches_that_are_no_tree(branches, message):
    with pytest.raises(ValueError, match=message):
        tree.parents_from_paths(branches)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([], "num_slots: expected 1 to 64, got 0"),
        ([0], "expected -1 for slot 0, the root, got 0"),
        ([-1, 1], "expected a slot from 0 to 0 for slot 1, got 1"),
        ([[-1, 0], [-1, -1]], "expected a slot from 0 to 0 for slot 1, got -1"),
        (torch.tensor([-1, 0, 2]), "expected a slot from 0 to 1 for slot 2, got 2"),
        ([-1] + [0] * 64, "num_slots: expected 1 to 64, got 65"),
    ],
)
def test_validate(parents, message):
    with pytest.raises(ValueError, match=message):
        tree.validate_tree(parents)


def test_validate_accepts_trees():
    tree.validate_tree(PARENTS)
    tree.validate_tree(torch.tensor([PARENTS, [-1, 0, 1, 2, 3, 4]]))
    tree.validate_tree([-1])


@pytest.mark.parametrize("num_slots", [0, 65])
def test_number_of_slots(num_slots):
    for make in (tree.chain_parents, tree.chain_ancestors):
        with pytest.raises(ValueError, match=f"expected 1 to 64, got {num_slots}"):
            make(num_slots)
    with pytest.raises(ValueError, match=f"expected 1 to 64, got {num_slots}"):
        tree.ancestors_from_parents(torch.zeros(num_slots, dtype=torch.int32))


def test_nothing_is_read_back():
    with FakeTensorMode():
        parents = torch.zeros(3, 17, dtype=torch.int32)
        assert tree.ancestors_from_parents(parents).shape == (3, 17)
        assert tree.depths(parents).shape == (3, 17)
        assert tree.chain_ancestors(5, batch_size=2).shape == (2, 5)
