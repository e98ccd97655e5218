"""The reference pinned by literals worked out by hand: those of its documentation, and a tree."""

import math

import pytest
import torch

from lvspec import reference, tree
from lvspec.policy import AcceptancePolicy

LN2, LN4, LN8 = math.log(2), math.log(4), math.log(8)

# The tree of lvspec.tree:   0 -> 1 -> (3, 4),  0 -> 2 -> 5
PARENTS = [-1, 0, 0, 1, 1, 2]
ANCESTORS = [1, 3, 5, 11, 19, 37]


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def column(values):
    """One sequence, one head, D = 1."""
    return float64(values).view(1, 1, -1, 1)


def close(got, expected):
    torch.testing.assert_close(got.flatten(), float64(expected), rtol=0, atol=1e-14)


def test_verify_attention_on_a_chain():
    got = reference.verify_attention(
        column([1.0, 1.0]),
        column([LN2, 0.0, 0.0, LN4]),
        column([1.0, 2.0, 3.0, 4.0]),
        int32([2]),
        torch.tensor([[0b01, 0b11]]),
        torch.tensor([[1, 0, 0, 0]], dtype=torch.uint8),
        scale=1.0,
    )
    close(got.out, [7 / 4, 23 / 8])
    close(got.lse, [LN4, LN8])
    close(got.visual_mass, [1 / 2, 1 / 4])
    close(got.visual_peak, [1 / 2, 1 / 4])


def test_verify_attention_on_a_tree():
    """Two committed positions, both video, weights 1 and 3; slot t has weight 2^t and value t."""
    got = reference.verify_attention(
        column([1.0] * 6),
        column([0.0, math.log(3)] + [t * LN2 for t in range(6)]),
        column([10.0, 20.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        int32([2]),
        torch.tensor([ANCESTORS]),
        torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8),
        scale=1.0,
    )
    # Sum of weights: 4 committed, and of each path 1 | 1+2 | 1+4 | 1+2+8 | 1+2+16 | 1+4+32.
    total = [5, 7, 9, 15, 23, 41]
    # Sum of weight times value: 10 + 60, and 0 | 2 | 8 | 2+24 | 2+64 | 8+160.
    close(got.out, [70 / 5, 72 / 7, 78 / 9, 96 / 15, 136 / 23, 238 / 41])
    close(got.lse, [math.log(weight) for weight in total])
    close(got.visual_mass, [4 / weight for weight in total])
    close(got.visual_peak, [3 / weight for weight in total])


def test_plan_splits():
    """Text 0-1, video 2-6 in pieces of 3, text 7, then generated text in pieces of 2 up to 11."""
    visual = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0], [0] * 11], dtype=torch.uint8)
    got = reference.plan_splits(visual, int32([8, 0]), max_piece=3, tail_piece=2, num_pieces=7)
    assert got.start.tolist() == [[0, 2, 5, 7, 8, 10, 0], [0, 2, 4, 6, 8, 10, 0]]
    assert got.end.tolist() == [[2, 5, 7, 8, 10, 11, 0], [2, 4, 6, 8, 10, 11, 0]]
    assert got.kind.tolist() == [[0, 1, 1, 0, 0, 0, -1], [0, 0, 0, 0, 0, 0, -1]]


def test_logit_stats():
    got = reference.logit_stats(float64([[[LN2, LN4, -math.inf, LN2]]]), top_k=3)
    assert got.top_ids.tolist() == [[[1, 0, 3]]]
    close(got.top_logits, [LN4, LN2, LN2])
    close(got.lse, [LN8])
    close(got.entropy, [1.5 * LN2])


@pytest.mark.parametrize(
    ("row", "ids", "lse"),
    [
        ([1.0, math.nan, 3.0, 3.0], [2, 3, 0, 1], math.nan),
        ([math.nan] * 4, [0, 1, 2, 3], math.nan),
        ([0.0, math.inf, 5.0, math.inf], [1, 3, 2, 0], math.inf),
        ([-math.inf] * 4, [0, 1, 2, 3], -math.inf),
    ],
)
def test_logit_stats_of_irregular_rows(row, ids, lse):
    got = reference.logit_stats(torch.tensor([[row]]), top_k=4)
    assert got.top_ids.tolist() == [[ids]]
    torch.testing.assert_close(got.lse, torch.tensor([[lse]]), equal_nan=True)
    assert got.entropy.isnan().all()


CHAIN_LOGITS = [[0.0, 3.0, 2.0, 1.0], [0.0, 2.0, 1.0, 3.0], [3.0, 0.0, 2.0, 1.0], [1.0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("limits", "path", "bonus_id", "kind", "regret"),
    [
        ({"top_k": 2}, [0, 1, -1, -1], 3, [0, 0, 255, 255], 0.0),
        ({"top_k": 3}, [0, 1, 2, 3], 0, [0, 0, 1, 1], 4.0),
        ({"top_k": 3, "window": 1}, [0, 1, -1, -1], 3, [0, 0, 255, 255], 0.0),
        ({"top_k": 2, "shift_window": 1}, [0, 1, 2, 3], 0, [0, 0, 2, 2], 4.0),
        ({"top_k": 3, "max_run": 1}, [0, 1, 2, -1], 0, [0, 0, 1, 255], 2.0),
        ({"max_regret": 2.0}, [0, 1, 2, 3], 0, [0, 0, 1, 1], 4.0),
        ({"max_regret": 1.5}, [0, 1, -1, -1], 3, [0, 0, 255, 255], 0.0),
        ({"regret_budget": 4.0}, [0, 1, 2, 3], 0, [0, 0, 1, 1], 4.0),
        ({"regret_budget": 3.5}, [0, 1, 2, -1], 0, [0, 0, 1, 255], 2.0),
        ({"strict_ids": (0,)}, [0, 1, 2, -1], 0, [0, 0, 1, 255], 2.0),
        ({"eos_ids": (2,)}, [0, 1, -1, -1], 3, [0, 0, 255, 255], 0.0),
        ({"eos_ids": (1,)}, [0, 1, -1, -1], 3, [0, 0, 255, 255], 0.0),
        ({"eos_ids": (0,)}, [0, -1, -1, -1], 1, [0, 255, 255, 255], 0.0),
    ],
)
def test_accept_on_a_chain(limits, path, bonus_id, kind, regret):
    logits = torch.tensor([CHAIN_LOGITS])
    got = reference.accept(
        logits,
        torch.tensor([[0, 1, 2, 3]]),
        tree.chain_parents(4, batch_size=1),
        int32([4]),
        reference.logit_stats(logits, top_k=3),
        None,
        AcceptancePolicy(anchor_threshold=math.inf, **limits),
    )
    assert got.path.tolist() == [path]
    assert got.num_accepted.tolist() == [4 - path.count(-1) - 1]
    assert got.bonus_id.tolist() == [bonus_id]
    assert got.kind.tolist() == [kind]
    assert got.regret.tolist() == [regret]


# Row 0 wants 7. Its children bring 5 (regret 1) and 6 (regret 2). Row 1 wants 7 as well; its
# children bring 7 and 0. Row 2 wants 3; its child brings 3. All other tokens have regret 9, more
# than is allowed.
TREE_TOKENS = [0, 6, 5, 0, 7, 3]
TREE_LOGITS = [
    [0, 0, 0, 0, 0, 8, 7, 9],
    [0, 0, 0, 0, 0, 0, 0, 9],
    [0, 0, 0, 9, 0, 0, 0, 0],
    [0, 9, 0, 0, 0, 0, 0, 0],
    [0, 0, 9, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 9, 0, 0, 0],
]


@pytest.mark.parametrize(
    ("fields", "path", "bonus_id", "kind", "regret"),
    [
        # Nothing tolerated: the root alone.
        ({"anchor_threshold": -math.inf}, [0], 7, [0], 0.0),
        # Both children are loose and have an exact child; 5 costs less.
        ({"anchor_threshold": math.inf}, [0, 2, 5], 4, [0, 1, 0], 1.0),
        # The root's row is an anchor (relevance 0.5), so only a shift remains: 6 displaced 7,
        # which slot 4 brings one level below.
        (
            {"anchor_threshold": 0.5, "shift_window": 1},
            [0, 1, 4],
            2,
            [0, 2, 0],
            2.0,
        ),
        # The same, but two exact tokens would have to follow.
        (
            {"anchor_threshold": 0.5, "shift_window": 1, "window": 2},
            [0],
            7,
            [0],
            0.0,
        ),
        # The root's row is no anchor: slot 2 is loose and costs less than slot 1.
        (
            {"anchor_threshold": 0.6, "shift_window": 1},
            [0, 2, 5],
            4,
            [0, 1, 0],
            1.0,
        ),
    ],
)
def test_accept_on_a_tree(fields, path, bonus_id, kind, regret):
    logits = float64([TREE_LOGITS])
    got = reference.accept(
        logits,
        torch.tensor([TREE_TOKENS]),
        int32([PARENTS]),
        int32([6]),
        reference.logit_stats(logits),
        torch.tensor([[0.5, 0, 0, 0, 0, 0]]),
        AcceptancePolicy(max_regret=2.0, **fields),
    )
    padding = 6 - len(path)
    assert got.path.tolist() == [path + [-1] * padding]
    assert got.bonus_id.tolist() == [bonus_id]
    assert got.kind.tolist() == [kind + [255] * padding]
    assert got.regret.tolist() == [regret]


def accept_one(parents, tokens, wanted, regrets, relevance, **fields):
    """The path and its kinds and regret, where row i wants `wanted[i]` and a draft token loses
    `regrets[t]` nats; every token that is not drafted loses 9. Nothing with a regret is loose."""
    logits = torch.full((1, len(tokens), 10), -9.0)
    for t, parent in enumerate(parents[1:], start=1):
        logits[0, parent, tokens[t]] = -regrets[t]
    for row, token in enumerate(wanted):
        logits[0, row, token] = 0.0
    got = reference.accept(
        logits,
        torch.tensor([tokens]),
        int32([parents]),
        int32([len(tokens)]),
        reference.logit_stats(logits, top_k=1),
        torch.tensor([relevance]),
        AcceptancePolicy(**{"anchor_threshold": 0.5, "max_regret": 0.0, **fields}),
    )
    length = int(got.num_accepted) + 1
    return got.path[0, :length].tolist(), got.kind[0, :length].tolist(), float(got.regret)


@pytest.mark.parametrize(
    ("drafted", "wanted", "regrets", "anchors", "window", "kinds"),
    [
        # Insertion: 5 stands in front of the 1 that is wanted, and the target goes on from there.
        ([5, 1, 2], [1, 1, 2, 3], [1, 0, 0], [], 1, [2, 0, 0]),
        ([5, 1, 2], [1, 1, 2, 3], [1.5, 0, 0], [], 1, []),
        ([5, 1, 2], [1, 1, 2, 3], [1, 0, 0], [], 0, []),
        # At an anchor: its own word follows, or comes too late, or not at all.
        ([5, 1, 2], [1, 1, 2, 3], [1, 0, 0], [0], 1, [2, 0, 0]),
        ([5, 1, 2], [1, 1, 2, 3], [1.5, 0, 0], [0], 1, []),
        ([5, 6, 1], [1, 1, 1, 2], [1, 1, 0], [0], 1, []),
        ([5, 6, 1], [1, 1, 1, 2], [1, 1, 0], [0, 1], 2, [2, 2, 0]),
        ([5, 2, 3], [1, 2, 3, 4], [1, 0, 0], [0], 3, []),
        # The target goes on as if nothing were inserted: what it displaced comes one by one.
        ([5, 1, 2], [1, 2, 3, 4], [1, 1, 1], [], 1, [2, 2, 2]),
        ([5, 1, 2], [1, 2, 3, 4], [1, 1, 1.5], [], 1, [2, 2]),
        # The last is early only, which nothing is at an anchor; the one before is late as well.
        ([5, 1, 2], [1, 2, 3, 4], [1, 1, 1], [2], 1, [2, 2]),
        ([5, 1, 2], [1, 2, 3, 4], [1, 1, 1], [1], 1, [2, 2, 2]),
        ([5, 1, 6], [1, 2, 3, 4], [1, 1, 1], [1], 1, []),
        # Omission: the word does not come any more, so it is none, however little it costs.
        ([2, 3], [1, 3, 4], [0.125, 0], [], 3, []),
        ([2, 3], [1, 3, 4], [0.125, 0], [0], 3, []),
        # But where it comes later it is.
        ([2, 3, 1], [1, 3, 1, 4], [0.125, 0, 0], [0], 2, [2, 0, 0]),
        # Swap: 2 and 1 for 1 and 2, of which the first is late and the second early.
        ([2, 1, 3], [1, 3, 3, 4], [1, 1, 0], [], 1, [2, 2, 0]),
        ([2, 1, 6], [1, 3, 3, 4], [1, 1, 2], [], 1, [2, 2]),
        ([2, 1, 3], [1, 3, 3, 4], [1, 1.5, 0], [], 1, []),
        ([2, 1, 3], [1, 3, 3, 4], [1.5, 1, 0], [], 1, []),
        # The second at an anchor: with the anchor's own word behind it, and without.
        ([2, 1, 3], [1, 3, 3, 4], [1, 1, 0], [1], 1, [2, 2, 0]),
        ([2, 1, 6], [1, 3, 3, 4], [1, 1, 2], [1], 1, []),
    ],
)
def test_shifts(drafted, wanted, regrets, anchors, window, kinds):
    """Chains, with `shift_regret` of one nat; `anchors` are rows."""
    slots = len(drafted) + 1
    path, found, regret = accept_one(
        [*range(-1, slots - 1)],
        [0, *drafted],
        wanted,
        [0, *regrets],
        [float(row in anchors) for row in range(slots)],
        shift_window=window,
        shift_regret=1.0,
    )
    assert path == [*range(len(kinds) + 1)] and found == [0, *kinds]
    assert regret == sum(regrets[: len(kinds)])


# Of the root's children the first is exact and has nothing behind it, the second is loose with two
# exact ones behind it, the third with one, which is the last slot but one.
EXACT_OR_LONG = ([-1, 0, 0, 0, 3, 2, 5], [0, 1, 2, 3, 4, 4, 5], [1, 0, 4, 4, 0, 5, 0])


@pytest.mark.parametrize(
    ("second", "third", "path_regret", "expected"),
    [
        (1.0, 1.0, 0.0, [0, 2, 5, 6]),
        (1.0, 1.0, 1.0, [0, 2, 5, 6]),  # 3 - 1 against 1 and 2 - 1
        (1.75, 9.0, 1.0, [0, 2, 5, 6]),
        (2.0, 9.0, 1.0, [0, 1]),  # equal: the least regret
        (2.0, 9.0, 0.5, [0, 2, 5, 6]),
        (1.0, 1.0, 2.0, [0, 1]),
        (2.25, 1.0, 1.0, [0, 1]),
        (2.25, 0.5, 1.0, [0, 3, 4]),
        (1.5, 0.5, 1.0, [0, 3, 4]),  # equal: the least regret, though the other is longer
        (9.0, 9.0, 0.0, [0, 2, 5, 6]),
    ],
)
def test_the_best_path(second, third, path_regret, expected):
    parents, tokens, wanted = EXACT_OR_LONG
    regrets = [0, 0, second, third, 0, 0, 0]
    fields = {"max_regret": None, "path_regret": path_regret}
    path, kinds, regret = accept_one(parents, tokens, wanted, regrets, [0.0] * 7, **fields)
    assert path == expected
    assert regret == (regrets[path[1]])
    assert kinds[1:] == [int(path[1] != 1)] + [0] * (len(path) - 2)


@pytest.mark.parametrize(
    ("parents", "regrets", "expected"),
    [
        # Equal paths: the one that ends first, whichever begins first.
        ([-1, 0, 0], [0, 1, 1], [0, 1]),
        ([-1, 0, 0, 2, 1], [0, 1, 1, 1, 1], [0, 2, 3]),
        # A path that goes on counts as a whole, though its beginning alone would score more.
        ([-1, 0, 1], [0, 1, 4], [0, 1, 2]),
        ([-1, 0, 1, 0], [0, 1, 4, 1], [0, 3]),
    ],
)
def test_equal_paths_and_whole_paths(parents, regrets, expected):
    tokens = [0, *range(1, len(parents))]
    fields = {"max_regret": None, "path_regret": 1.0}
    path, _, regret = accept_one(
        parents, tokens, [9] * len(parents), regrets, [0.0] * len(parents), **fields
    )
    assert path == expected and regret == sum(regrets[t] for t in expected)


def test_commit_kv():
    letters = torch.tensor([ord(letter) for letter in "abr12345"], dtype=torch.float32)
    k_cache, v_cache = letters.view(1, 1, 8, 1).clone(), -letters.view(1, 1, 8, 1)
    path = int32([[0, 2, 5, -1, -1, -1]])
    assert reference.commit_kv(k_cache, v_cache, int32([2]), path, int32([2])) is None
    assert "".join(chr(int(x)) for x in k_cache.flatten()) == "abr25345"
    assert torch.equal(v_cache, -k_cache)


def test_visual_importance():
    got = reference.visual_importance(
        column([1.0]),
        column([LN2, 0.0, 0.0, 0.0]),
        int32([3]),
        torch.tensor([[1, 0, 1, 1]], dtype=torch.uint8),
        float64([[[LN4]]]),
        scale=1.0,
    )
    close(got, [2 / 4, 0, 1 / 4, 0])


def test_expand_tree():
    probabilities = float64([[[0.2, 0.2, 0.6], [0.25, 0.75, 0.0]]])
    got = reference.expand_tree(
        probabilities.log() + 5.0,  # logits are log-probabilities but for a constant
        float64([[0.5, 0.4]]).log(),
        int32([[4, 7]]),
        width=3,
        top_k=2,
    )
    assert sorted(got.tokens[0, :2].tolist()) == [1, 2]  # 0.30 and 0.30, but for rounding
    torch.testing.assert_close(got.log_probs.exp(), float64([[0.3, 0.3, 0.1]]))
    assert got.tokens[0, 2] == 0


def test_expand_tree_ties():
    """Equal in binary: the lower node first, then the lower token, whatever their ranks."""
    logits = float64([[[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    got = reference.expand_tree(logits, float64([[-1.0, -1.0]]), int32([[4, 7]]), width=5, top_k=3)
    assert got.tokens.tolist() == [[0, 1, 2, 0, 1]]
    assert got.parents.tolist() == [[4, 4, 4, 7, 7]]
    close(got.log_probs, [-1.0 - LN4] * 5)
