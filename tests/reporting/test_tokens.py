"""Token by token: what was wanted, what it cost, and what was thrown away."""

import math

import captions
import pytest

from lvspec.reporting.tokens import read_caption


def read(**changes):
    return read_caption(captions.result(**changes), "here")


def test_every_token_has_its_row():
    tokens = read().tokens
    assert [token.text for token in tokens] == captions.PIECES
    assert [token.iteration for token in tokens] == [None, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    loose, bonus, shift = tokens[3], tokens[4], tokens[5]
    assert (loose.kind, loose.wanted, loose.regret) == ("loose", " tiny", 0.4)
    assert [choice.is_taken for choice in loose.best] == [False, True, False, False, False]
    assert loose.probability == pytest.approx(math.exp(-0.8))
    assert (bonus.kind, bonus.wanted, bonus.regret) == ("bonus", " blue", 0.0)
    assert bonus.is_anchor and bonus.rejected == (" red",)
    assert [choice.text for choice in bonus.best if choice.is_taken] == [" blue"]
    assert (shift.kind, shift.wanted, shift.threshold) == ("shift", "room", 0.06)
    assert tokens[0].best == () and tokens[0].relevance is None
    assert tokens[-1].name == "<|im_end|>"


def test_iterations_tell_refused_from_unseen():
    first, second, third = read().iterations
    assert (first.drafted, first.accepted) == (4, 3)
    assert [kind for _, kind in first.chips] == ["exact", "exact", "loose", "rejected", "bonus"]
    assert second.chips[2:] == ((",", "rejected"), (" a", "unused"), ("\n", "bonus"))
    assert third.chips[-1] == (" ends", "bonus")


def test_of_a_tree_what_was_beside_the_path_is_rejected():
    tree = captions.step(
        *(1, [" clip", " red", " shows", " a"], [" clip", " shows", " a", " blue", " small"]),
        [0.02] * 5,
        path=[1, 3],
        kinds=["exact", "exact"],
        regrets=[0.0, 5.0, 0.0, 0.0],
    )
    parents = {**tree.to_dict(), "parents": [0, 0, 1, 2]}
    caption = read(trace=[parents])
    assert caption.tokens[1].rejected == (" red",)
    kinds = ["exact", "rejected", "exact", "unused", "bonus"]
    assert [kind for _, kind in caption.iterations[0].chips] == kinds


def test_without_a_trace_there_is_what_there_is():
    caption = read(traced=False)
    assert [token.kind for token in caption.tokens] == captions.KINDS
    assert caption.tokens[3].best == () and caption.iterations == ()
    alone = read(traced=False, kinds=None, relevance=None, pieces=None, anchors=None)
    assert alone.tokens[0].text == "#10" and alone.tokens[0].kind == "target"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": None}, "TypeError"),
        ({"kinds": ["exact"]}, "1 kinds of 11 tokens"),
        ({"pieces": ["a", "b"]}, "2 pieces of 11 tokens"),
        ({"trace": [{"position": 1}]}, "trace: expected steps with position"),
        ({"trace": 3}, "TypeError"),
        ({"frames": {"timestamps": [], "mass": [[0.1]]}}, "frames of 1 tokens"),
        ({"vocabulary": {"x": "y"}}, "ValueError"),
    ],
)
def test_a_damaged_result_is_named(changes, message):
    with pytest.raises(ValueError, match="^here: expected a result as lvspec writes it") as caught:
        read(**changes)
    assert message in str(caught.value)
