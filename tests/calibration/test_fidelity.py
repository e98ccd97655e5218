"""What is kept of the target's own, and how often a bound on it is wrong."""

import math

import numpy as np
import pytest

from lvspec.calibration.candidates import Candidate
from lvspec.calibration.certificate import Certifier
from lvspec.calibration.fidelity import Fidelity, anchors_kept, anchors_of
from lvspec.evaluation.samples import Sample
from lvspec.policy import AcceptancePolicy

SAMPLE = Sample("a", "a.mp4", "what?", references=("a red ball",))


def caption(text="", tokens=(1, 2), relevance=None, threshold=None, **facts):
    stats = {"anchor_threshold": threshold, "regret": 0.0}
    relevance = relevance or [None, *[0.0] * (len(tokens) - 1)]
    facts = {"error": None, "iterations": 1, "decode_s": 1.0, "seconds": 1.0, **facts}
    return {"text": text, "tokens": list(tokens), "relevance": relevance, "stats": stats, **facts}


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        ([1, 2, 3, 4], 1.0),
        ([1, 9, 3, 4], 1.0),  # another filler
        ([1, 2, 9, 4], 0.5),  # another anchor
        ([7, 8, 1, 2, 3, 4], 1.0),  # further on
        ([1, 2, 4, 3], 0.5),  # in another order
        ([3], 0.5),
        ([], 0.0),
    ],
)
def test_anchors_in_their_places(tokens, kept):
    assert anchors_kept(tokens, [1, 2, 3, 4], [False, False, True, True]) == kept


def test_without_an_anchor_every_token_counts():
    assert anchors_kept([1, 9, 3], [1, 2, 3], [False] * 3) == pytest.approx(2 / 3)


def test_which_tokens_are_anchors():
    relevance = [None, 0.1, 0.3, 0.2]
    assert anchors_of(caption(tokens=[1] * 4, relevance=relevance, threshold=0.2)) == [
        *(False, False, True, True)
    ]
    assert anchors_of(caption(tokens=[1] * 4, relevance=relevance)) == [True] * 4


def test_a_metric_with_references_is_relative_to_the_targets_own():
    fidelity = Fidelity("rouge_l", 0.9, 0.95)
    own, other = caption("a red ball"), caption("a red cube")
    assert fidelity.score(SAMPLE, other, own) == (pytest.approx(2 / 3), 1.0)
    assert fidelity.value([(0.5, 1.0), (0.4, 0.5)]) == pytest.approx(0.6)
    # Whether the target is right or wrong, to lose nothing is to hold.
    few, many = [(0.5, 0.5)] * 5, [(0.5, 0.5), (1.0, 1.0)] * 60
    assert fidelity.holds(many) and not fidelity.holds(few)
    assert not fidelity.holds([(0.4, 0.5)] * 200)


def test_a_users_metric(tmp_path, monkeypatch):
    (tmp_path / "my_metric.py").write_text(
        "def red(text, sample, own):\n    return float('red' in text)\n"
        "def many(text, sample, own):\n    return 37\n"
    )
    monkeypatch.chdir(tmp_path)
    fidelity = Fidelity("my_metric:red", 0.9, 0.95)
    assert fidelity.score(SAMPLE, caption("a ball"), caption("a red ball")) == (0.0, 1.0)
    with pytest.raises(ValueError, match="metric: expected scores from 0 to 1, got 37"):
        Fidelity("my_metric:many", 0.9, 0.95).score(SAMPLE, caption(), caption())
    with pytest.raises(ValueError, match="metric: expected"):
        Fidelity("my_metric:none", 0.9, 0.95)
    with pytest.raises(ValueError, match="fidelity: expected a number above 0 and below 1"):
        Fidelity("anchors", 1.0, 0.95)


@pytest.mark.parametrize("metric", ["anchors", "own_same", "rouge_l"])
@pytest.mark.parametrize("wanted", [0.8, 0.95])
def test_clips_that_are_needed(metric, wanted):
    fidelity = Fidelity(metric, wanted, 0.95)
    assert fidelity.can_hold([], fidelity.needed)
    assert not fidelity.can_hold([], fidelity.needed - 1)
    # Nobody can do with fewer than those of which chance leaves all perfect too seldom.
    assert fidelity.needed >= math.log(0.05) / math.log(wanted)
    assert Fidelity("own_same", 0.998, 0.95).needed == 1497


def test_the_lower_bound_is_where_it_stops_to_hold():
    fidelity, scores = Fidelity("own_same", 0.9, 0.95), [1.0] * 58 + [0.0] * 2
    bound = fidelity.lower_bound(scores)
    assert bound == pytest.approx(0.8989, abs=1e-3)  # Clopper and Pearson, one side
    assert fidelity.holds(scores, bound - 1e-4) and not fidelity.holds(scores, bound + 1e-4)


class Played:
    """Stands in for runs: captions of which the metric is known, from a rate by candidate."""

    def __init__(self, rates, samples, seed):
        draw = np.random.default_rng(seed)
        self.made = []
        self.scores = {
            key: dict(zip([s.id for s in samples], draw.random(len(samples)) < rate, strict=True))
            for key, rate in rates.items()
        }

    def captions(self, way, samples, goes_on=None, timed=0):
        found = []
        for sample in samples:
            is_right = self.scores[way.candidate.key][sample.id]
            found.append((sample, caption("same" if is_right else "other")))
            self.made.append(way.candidate.key)
            if goes_on is not None and not goes_on(found):
                break
        return found

    def alone_beside(self, way, samples):
        return []


@pytest.fixture
def candidates():
    return [Candidate(AcceptancePolicy.lvspec(), gamma) for gamma in (4, 8, 12)]


def certified(rates, candidates, count, seed, fidelity):
    samples = [Sample(str(i), "a.mp4", "what?") for i in range(count)]
    played = Played(dict(zip([c.key for c in candidates], rates, strict=True)), samples, seed)
    certifier = Certifier(played, [(s, caption("same")) for s in samples], fidelity, [])
    return certifier.sequence(candidates, to_the_end=False), played


def test_the_first_that_fails_is_the_last(candidates):
    fidelity = Fidelity("own_same", 0.9, 0.95)
    found, played = certified((1.0, 0.3, 1.0), candidates, 60, 0, fidelity)
    assert [each.holds for each in found] == [True, False]
    # What cannot hold any more is not captioned to the end.
    assert played.made.count(candidates[1].key) < 20
    assert found[0].lower_bound > 0.9 and math.isnan(found[1].lower_bound)
    assert candidates[2].key not in played.made


def test_a_caption_that_broke_off_keeps_nothing(candidates):
    fidelity = Fidelity("own_same", 0.5, 0.95)
    samples = [Sample("0", "a.mp4", "what?")]
    certifier = Certifier(None, [(samples[0], caption("same"))], fidelity, [])
    assert certifier._scores(fidelity, [(samples[0], caption("same"))]) == [1.0]
    assert certifier._scores(fidelity, [(samples[0], caption("same", error="NaN"))]) == [0.0]


@pytest.mark.parametrize("rates", [(0.89, 0.89, 0.89), (0.95, 0.89, 0.7), (0.97, 0.96, 0.89)])
@pytest.mark.slow
def test_false_certificates_are_as_rare_as_stated(candidates, rates):
    """Whatever is certified has the fidelity, but for one time in twenty."""
    fidelity, rounds, wrong = Fidelity("own_same", 0.9, 0.95), 150, 0
    for seed in range(rounds):
        found, _ = certified(rates, candidates, 80, seed, fidelity)
        kept = [rates[candidates.index(each.candidate)] for each in found if each.holds]
        wrong += any(rate < fidelity.wanted for rate in kept)
    # Of 150 rounds at 5 % at most, 17 or more come with a chance of 0.2 %.
    assert wrong < 17


def test_false_certificates_of_shares_are_as_rare_as_stated():
    """Scores between 0 and 1: most of them perfect, and few of them that lose all."""
    for metric, mean in (("anchors", 0.9), ("rouge_l", 0.9)):
        fidelity, wrong = Fidelity(metric, mean, 0.95), 0
        for seed in range(300):
            draw = np.random.default_rng(seed)
            kept = np.where(draw.random(80) < 0.8, 1.0, draw.random(80))  # 0.9 on the average
            own = draw.choice([0.5, 1.0], 80)
            scores = list(kept) if metric == "anchors" else list(zip(kept * own, own, strict=True))
            wrong += fidelity.holds(scores)
        assert wrong < 27  # of 15 at most on the average: 0.2 %
