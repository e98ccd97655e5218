"""The visual gate: strict where there is nothing to see, and said where it does not fit the pair.

And what is behind the end of the output: no number that speaks of output counts it.
"""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from policies import gated

from lvspec import AcceptancePolicy, DecodeConfig, Decoder, DynamicTree, generate
from lvspec.cli.terminal import statistics_line
from lvspec.engine import gate
from lvspec.engine.stats import DecodeStats

GATED = 0.16  # of the random target a fifth of the rows have more
LOOSE = gated(GATED, top_k=8, shift_window=3)
OPEN = gated(math.inf, top_k=8, shift_window=3)
STRICT = AcceptancePolicy.strict()
WAYS = {
    "chain": (True, {}),
    "tree": (True, {"tree": DynamicTree(width=3, depth=3)}),
    "n-grams": ("ngram", {"ngram_max": 1}),
    "sampling": (True, {"temperature": 0.8, "seed": 2}),
}


@pytest.fixture(scope="module")
def draft(random_pair):
    """The target's weights and noise enough for many a word to be another."""
    draft = copy.deepcopy(random_pair[0])
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return draft


@pytest.fixture
def run(random_pair, draft):
    def run(inputs, policy, way="chain", target=None, **config):
        model, options = WAYS[way]
        config = {"gamma": 6, "max_new_tokens": 40, "eos_ids": (), **options, **config}
        return generate(
            target or random_pair[0],
            draft if model is True else model,
            inputs,
            policy=policy,
            config=DecodeConfig(**config),
        )

    return run


@pytest.fixture
def texts(make_prompt):
    return [make_prompt(9, seed=3), make_prompt(14, seed=4)]


@pytest.fixture
def visual(make_prompt):
    return [make_prompt(3, ("video", 4, 6, 6), 5), make_prompt(4, ("image", 4, 8), 5, seed=1)]


@pytest.mark.parametrize(
    "way", ["chain", "tree", "n-grams", pytest.param("sampling", marks=pytest.mark.slow)]
)
def test_strict_without_anything_visual(run, texts, visual, way):
    """Each sequence by itself, whoever its neighbours are."""
    together = [texts[0], visual[0], texts[1], visual[1]]
    found = run(together, LOOSE, way)
    wanted, free = run(together, STRICT, way), run(together, OPEN, way)
    for index in (0, 2):
        assert found[index].tokens.equal(wanted[index].tokens)
        counts = found[index].stats.counts
        assert (counts["loose"], counts["shift"], found[index].stats.regret) == (0, 0, 0)
        assert found[index].stats.gate == "strict" and found[index].stats.anchor_share is None
        assert free[index].stats.counts["loose"] > 0, "loose without a gate"
        assert free[index].stats.gate == "none"
    for index in (1, 3):
        assert found[index].stats.counts["loose"] > 0
        assert found[index].stats.gate == "on" and 0 < found[index].stats.anchor_share < 1
        assert wanted[index].stats.gate == "none"
    assert found[0].to_dict()["stats"]["gate"] == "strict"


def test_a_place_that_is_taken_again(random_pair, draft, texts, visual):
    """By a prompt of the other kind."""
    config = DecodeConfig(gamma=6, max_new_tokens=40, eos_ids=())
    decoder = Decoder(random_pair[0], draft, LOOSE, config)
    order = [visual[0], texts[0], visual[0], texts[1]]
    kept = [decoder.generate(prompt) for prompt in order]
    assert [each.stats.gate for each in kept] == ["on", "strict", "on", "strict"]
    assert kept[0].tokens.equal(kept[2].tokens)
    assert [each.stats.counts["loose"] > 0 for each in kept] == [True, False, True, False]


def _warnings_of(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(each.message) for each in caught if "anchor_threshold" in str(each.message)]


def test_a_threshold_that_does_not_fit_is_said_once(random_pair, run, visual):
    target = copy.deepcopy(random_pair[0])
    high = gated(0.9, top_k=2)
    found, said = _warnings_of(lambda: run(visual, high, target=target))
    assert [each.stats.gate for each in found] == ["flags nothing"] * 2
    assert [each.stats.anchor_share for each in found] == [0, 0]
    assert len(said) == 1
    assert said[0].startswith(
        "lvspec: anchor_threshold: expected a threshold that fits this target"
    )
    assert "got 0.9, which took 0 of 39 rows for anchors: nothing is checked strictly" in said[0]
    assert _warnings_of(lambda: run(visual[0], high, target=target))[1] == []

    low = gated(1e-9, top_k=2)
    found, said = _warnings_of(lambda: run(visual[0], low, target=target))
    assert (found.stats.gate, found.stats.anchor_share) == ("flags everything", 1)
    assert len(said) == 1 and "39 of 39 rows" in said[0]
    other = copy.deepcopy(random_pair[0])
    assert len(_warnings_of(lambda: run(visual[0], low, target=other))[1]) == 1
    assert "gate flags everything" in statistics_line(found)


@pytest.mark.parametrize("threshold", [-math.inf, 0.25])
def test_one_that_was_found_may_not_fit_either(random_pair, threshold):
    """First nothing was found, so that every row was strict; then too little of it was left."""
    stats = DecodeStats(torch.device("cpu"), 40)
    stats.is_gated = stats.is_calibrating = True
    stats.add(31, 41, 0.0, num_anchors=32, threshold=-math.inf)
    stats.add(7, 41, 0.0, num_anchors=8, threshold=threshold)
    stats.num_strict -= threshold == -math.inf  # as if one of both had one
    target = copy.deepcopy(random_pair[0])
    _, said = _warnings_of(lambda: gate.warn_of_gate(target, "auto", stats))
    assert stats.gate == "flags everything" and len(said) == 1
    assert f"got 'auto' ({threshold:g} in the end), which took 40 of 40 rows" in said[0]


def test_what_says_nothing_is_not_said(random_pair, run, visual, texts):
    """Few rows, no gate, a strict policy, a gate that works, and text."""
    target = copy.deepcopy(random_pair[0])
    high = gated(0.9, top_k=2)
    calls = [
        (visual[0], high, {"max_new_tokens": 32}),  # the first token has no row of a pass
        (visual[0], OPEN, {}),
        (visual[0], STRICT, {"trace": True}),
        (visual[0], LOOSE, {}),
        (texts[0], high, {}),
    ]
    for prompt, policy, options in calls:
        found, said = _warnings_of(partial(run, prompt, policy, target=target, **options))
        assert said == [] and not found.stats.gate.startswith("flags")
    assert target not in gate._WARNED
    assert len(_warnings_of(lambda: run(visual[0], high, target=target, max_new_tokens=33))[1]) == 1


@pytest.mark.parametrize("way", ["chain", "tree"])
@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_behind_the_end_nothing_counts(random_pair, run, visual, hf_rows, way, lag):
    """Wherever the output ends, by its length or by a stop, the numbers are those of the output."""
    whole = run(visual[0], LOOSE, way)
    costs = _costs(whole, hf_rows(random_pair[0], visual[0], whole.tokens[0].tolist())[0])
    assert sum(cost > 0 for cost in costs) > 5
    is_anchor = (whole.relevance[0] >= GATED).tolist()
    ends = set()
    for count in range(2, 24):
        found = run(visual[0], LOOSE, way, max_new_tokens=count, lag=lag)
        stats = found.stats
        assert found.tokens.equal(whole.tokens[:, :count])
        assert stats.num_emitted == sum(stats.num_accepted) + stats.num_iterations == count - 1
        assert stats.tau == pytest.approx((count - 1) / stats.num_iterations)
        assert stats.tau <= count - 1
        assert stats.regret == pytest.approx(sum(costs[:count]), abs=1e-4)
        assert stats.num_anchors == sum(is_anchor[:count])
        kinds = found.kinds[0].tolist()
        assert [stats.counts[name] for name in ("exact", "loose", "shift", "bonus")] == [
            kinds.count(code) for code in range(4)
        ]
        ends.add(stats.num_accepted[-1])
    assert len(ends) > 2, "in the middle of passes"


@pytest.mark.parametrize("lag", [0, 1])
def test_a_stop_counts_like_an_end(random_pair, draft, run, visual, lag):
    for count in (3, 6, 9, 14):
        ended = run(visual[0], LOOSE, max_new_tokens=count).stats
        stopped = generate(
            *(random_pair[0], draft, visual[0]),
            policy=LOOSE,
            config=DecodeConfig(gamma=6, max_new_tokens=40, eos_ids=(), lag=lag),
            stopping_criteria=[_AtLength(visual[0]["input_ids"].shape[1] + count)],
        ).stats
        for name in ("num_accepted", "num_drafted", "num_anchors", "counts", "tau", "gate"):
            assert getattr(stopped, name) == getattr(ended, name), name
        assert stopped.acceptance_by_position == ended.acceptance_by_position
        assert stopped.regret == pytest.approx(ended.regret, abs=1e-6)


class _AtLength:
    def __init__(self, length):
        self.length = length

    def __call__(self, ids, scores):
        return torch.tensor([ids.shape[1] >= self.length])


def _costs(generation, logits):
    """Regret of every output token, by HF's rows."""
    tokens, kinds = generation.tokens[0].tolist(), generation.kinds[0].tolist()
    return [
        float(row.max() - row[token]) if kind in (1, 2) else 0.0
        for token, kind, row in zip(tokens, kinds, logits)
    ]
