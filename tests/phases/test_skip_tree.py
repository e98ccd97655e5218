"""Skip trees: which branches there are, and where their tokens and the draft's rows come from."""

import copy
import math
import random

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig, SkipTree, generate, ops
from lvspec.engine.api import generate_many
from lvspec.phases.accept import Judgement
from lvspec.phases.draft.skip_tree import (
    Branches,
    in_slots,
    num_until_end,
    what_was_left,
    with_best,
)
from lvspec.phases.iteration import Iteration

GAMMA = 5
CHAIN = torch.tensor([[10, 11, 12, 13, 14]])
ALL = torch.tensor([GAMMA])
NONE = Branches(*torch.zeros(3, 1, 1, dtype=torch.int64))


def _slots(branches, nodes, left=(0,) * GAMMA, chain=CHAIN):
    """Parents and tokens of the slots behind the chain, padding left out."""
    parents, places, num_slots = in_slots(branches, GAMMA, nodes)
    tokens = torch.cat([chain, torch.tensor([left])], dim=1).gather(1, places)
    count = int(num_slots) - GAMMA - 1
    return parents[0, :count].tolist(), tokens[0, :count].tolist()


def _best(scores, most, count=ALL, chain=CHAIN):
    return with_best(NONE, chain, count, torch.tensor([scores]), most)


def test_branches_of_a_chain():
    """Without 11; without 11 and 12; without 12; without 10."""
    branches = _best([-3.0, -1.0, -2.0, -9.0], 4)
    parents, tokens = _slots(branches, 20)
    assert tokens == [12, 13, 14] + [13, 14] + [13, 14] + [11, 12, 13, 14]
    assert parents == [1, 6, 7] + [1, 9] + [2, 11] + [0, 13, 14, 15]


def test_the_second_token_is_left_out_of_the_branch_without_the_first():
    """Without 10; without 10 and 12, behind 11 in the first branch; without 12."""
    branches = _best([-1.0, -9.0, -2.0, -9.0], 3)
    parents, tokens = _slots(branches, 20)
    assert tokens == [11, 12, 13, 14] + [13, 14] + [13, 14]
    assert parents == [0, 6, 7, 8] + [6, 10] + [2, 12]


def test_three_tokens_are_left_out():
    """Without 10; without 11, too; without 13, too, behind 12 in that."""
    branches = _best([-1.0, -1.0, -9.0, -1.0], 3)
    parents, tokens = _slots(branches, 20)
    assert tokens == [11, 12, 13, 14] + [12, 13, 14] + [14]
    assert parents == [0, 6, 7, 8] + [0, 10, 11] + [10]


def test_a_branch_that_does_not_fit_is_cut():
    branches = _best([-1.0, -9.0, -2.0, -9.0], 3)
    assert _slots(branches, 5) == ([0, 6, 7, 8, 6], [11, 12, 13, 14, 13])
    assert _slots(branches, 7) == ([0, 6, 7, 8, 6, 10, 2], [11, 12, 13, 14, 13, 14, 13])


def test_nothing_behind_the_end_of_the_sequence():
    """12 ends it: only what is before it is left out, and branches end with it."""
    count = num_until_end(CHAIN, torch.tensor([7, 12]))
    assert count.tolist() == [3]
    assert _slots(_best([-2.0, -1.0, -0.5, -0.5], 9, count), 20) == (
        [1] + [0, 7] + [0],
        [12] + [11, 12] + [12],
    )
    assert num_until_end(CHAIN, torch.tensor([], dtype=torch.int64)).tolist() == [5]


def test_what_makes_no_branch():
    """A token before its like: without it the chain is the same; and a row that is no number."""
    chain = torch.tensor([[10, 10, 12, 13, 14]])
    branches = _best([-1.0, math.nan, -math.inf, -4.0], 9, chain=chain)
    assert _slots(branches, 20, chain=chain) == ([3], [14])


def test_what_was_left_begins_where_the_chain_is_another():
    for left, count, expected in [
        ((20, 21, 22, 0, 0), 3, ([0, 6, 7], [20, 21, 22])),
        ((10, 11, 22, 23, 0), 4, ([2, 6], [22, 23])),
        ((10, 11, 22, 23, 0), 2, ([], [])),
        ((10, 11, 12, 13, 14), 5, ([], [])),
    ]:
        branches = what_was_left(CHAIN, torch.tensor([left]), torch.tensor([count]))
        assert _slots(branches, 20, left) == expected


def test_what_was_left_stands_before_the_others():
    """And the branch without 10 and 12 begins within the one without 10, wherever that stands."""
    left = (10, 11, 22, 23, 0)
    branches = what_was_left(CHAIN, torch.tensor([left]), torch.tensor([4]))
    scores = torch.tensor([[-1.0, -9.0, -2.0, -9.0]])
    branches = with_best(branches, CHAIN, ALL, scores, 3)
    assert _slots(branches, 20, left) == (
        [2, 6] + [0, 8, 9, 10] + [8, 12] + [2, 14],
        [22, 23] + [11, 12, 13, 14] + [13, 14] + [13, 14],
    )


def test_sequences_of_a_batch_have_their_own():
    chain = torch.cat([CHAIN, CHAIN + 20])
    scores = torch.tensor([[-1.0, -9.0, -2.0, -9.0], [-9.0, -9.0, -9.0, -1.0]])
    none = Branches(*torch.zeros(3, 2, 1, dtype=torch.int64))
    branches = with_best(none, chain, torch.tensor([5, 5]), scores, 1)
    parents, places, num_slots = in_slots(branches, GAMMA, 4)
    assert num_slots.tolist() == [10, 7]
    assert parents[0].tolist() == [0, 6, 7, 8] and int(parents[1, 0]) == 3
    assert places[0].tolist() == [1, 2, 3, 4] and int(places[1, 0]) == 4


@pytest.fixture(scope="module")
def models(random_pair, noisy_draft):
    return [copy.deepcopy(model).double() for model in (random_pair[0], noisy_draft)]


class _Expected:
    """The tree that is due, from the rows of HF's forward of the draft alone."""

    def __init__(self, tree, gamma):
        self.tree, self.gamma, self.left = tree, gamma, []

    def ways(self, chain, rows):
        """The tokens on the way to every slot; `rows`: log-probabilities before each of `chain`."""
        count = self.gamma - 1
        scores = [float(rows[i, chain[i + 1]]) for i in range(count)]
        sets = [()]
        for _ in range(self.tree.branches):
            more = [
                (min(scores[j] for j in (*each, i)), (*each, i))
                for each in reversed(sets)
                for i in range(each[-1] + 1 if each else 0, count)
                if (*each, i) not in sets and chain[i] != chain[i + 1]
            ]
            sets += [max(more, key=lambda found: found[0])[1]] if more else []
        # Of every slot: the way to it, and what is left behind it.
        slots = [((), chain)] + [
            (tuple(chain[:end]), chain[end:]) for end in range(1, self.gamma + 1)
        ]
        common = 0
        while common < len(self.left) and self.left[common] == chain[common]:
            common += 1
        slots += [
            (tuple(self.left[:end]), self.left[end:])
            for end in range(common + 1, len(self.left) + 1)
        ]
        for each in sets[1:]:
            for end in range(each[-1] + 2, self.gamma + 1):
                kept = (chain[i] for i in range(end) if i not in each)
                slots.append((tuple(kept), chain[end:]))
        self.slots = slots[: self.gamma + 1 + self.tree.nodes]
        return [way for way, _ in self.slots]

    def accept(self, path):
        self.left = self.slots[path[-1] if path else 0][1]


@pytest.fixture
def any_path(monkeypatch):
    """Whatever is drafted, the whole chain is accepted at first, and then any path of the tree."""
    choice, chains = random.Random(1), [GAMMA]

    def accept(self, verification, draft, cache):
        stats = ops.logit_stats(verification.logits, top_k=1)
        path = torch.full_like(draft.shape.parents, -1)
        for place, parents in enumerate(draft.shape.parents.tolist()):
            count = int(draft.shape.num_slots[place])
            way = [chains.pop() if chains else choice.randrange(count)]
            while way[-1] > 0:
                way.append(parents[way[-1]])
            path[place, : len(way)] = torch.tensor(way[::-1])
        accepted = (path >= 0).sum(1, dtype=torch.int32) - 1
        bonus = stats.top_ids[..., 0].gather(1, path.gather(1, accepted[:, None].long()).long())
        kind = torch.zeros_like(path, dtype=torch.uint8)
        regret = torch.zeros_like(self.state.regret_used)
        acceptance = ops.Acceptance(path, accepted, bonus[:, 0].long(), kind, regret)
        return Judgement(acceptance, stats, torch.full_like(regret, -math.inf))

    monkeypatch.setattr(Iteration, "accept", accept)


@pytest.mark.parametrize("tree", [SkipTree(4, 20), SkipTree(2, 4)], ids=str)
def test_the_tree_is_of_the_drafts_own_words(models, make_prompt, hf_rows, any_path, tree):
    """Behind any path: of a branch, of the chain, of what was left of the chain before.

    A row of the draft's cache that is wrong or missing would give other tokens from there on.
    """
    ends = set()
    prompt = make_prompt(3, ("video", 4, 6, 6), 5, seed=1, dtype=torch.float64)
    config = DecodeConfig(gamma=GAMMA, tree=tree, max_new_tokens=30, eos_ids=(), trace=True)
    strict = AcceptancePolicy.strict()
    generation = generate(*models, prompt, policy=strict, config=config)
    tokens, expected = generation.tokens[0].tolist(), _Expected(tree, GAMMA)
    for step in generation.trace.steps():
        chain = step.drafted[:GAMMA]
        rows, _ = hf_rows(models[1], prompt, [*tokens[: step.position], *chain])
        rows = rows[step.position : -1].log_softmax(-1)
        assert rows.argmax(-1).tolist() == chain
        ways = [()]
        for token, parent in zip(step.drafted, step.parents, strict=True):
            ways.append((*ways[parent], token))
        assert ways == expected.ways(chain, rows)
        expected.accept(step.path)
        ends.add("branch" if step.path and step.path[-1] > GAMMA else len(step.path))
    assert {"branch", GAMMA} < ends


def test_a_place_that_is_taken_again_remembers_nothing(models, make_prompt):
    """Neither what was left of another sequence, nor what of it the draft has not read."""
    prompts = [
        make_prompt(*parts, seed=index, dtype=torch.float64)
        for index, parts in enumerate([(3, ("video", 4, 6, 6), 5), (9,), (2, ("image", 4, 8), 4)])
    ]
    policy = AcceptancePolicy.strict()
    config = DecodeConfig(gamma=4, tree=SkipTree(3, 9), max_new_tokens=11, eos_ids=(), trace=True)
    together = generate_many(*models, prompts, batch_size=1, policy=policy, config=config)
    for prompt, ours in zip(prompts, together, strict=True):
        alone = generate(*models, prompt, policy=policy, config=config)
        assert [step.drafted for step in ours.trace.steps()] == [
            step.drafted for step in alone.trace.steps()
        ]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SkipTree(0), "tree.branches: expected an integer from 1 to 16, got 0"),
        (lambda: SkipTree(2, 62), "tree.nodes: expected an integer from 1 to 61, got 62"),
        (lambda: DecodeConfig(gamma=1, tree=SkipTree()), "gamma: expected at least 2 with a Skip"),
        (
            lambda: DecodeConfig(gamma=40, tree=SkipTree(4, 24)),
            r"gamma \+ tree.nodes: expected 2 to 64 slots, the root included, got 65",
        ),
    ],
)
def test_a_tree_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
