"""Intervals: textbook values, and coverage by simulation."""

import math

import numpy as np
import pytest

from lvspec.evaluation.intervals import (
    _bets,
    mean_interval,
    mean_lower,
    samples_needed,
    share_interval,
    share_lower,
)


def test_clopper_pearson():
    """Of 10 successes in 20 trials, and no failure in 20: tables have .272 to .728, and .832."""
    low, high = share_interval(10, 20)
    assert (low, high) == (pytest.approx(0.2720, abs=5e-5), pytest.approx(0.7280, abs=5e-5))
    assert share_interval(20, 20) == (pytest.approx(0.8316, abs=5e-5), 1.0)
    assert share_interval(0, 20) == (0.0, pytest.approx(0.1684, abs=5e-5))
    assert share_interval(0, 0) == (0.0, 1.0)
    assert share_lower(20, 20) == pytest.approx(0.05 ** (1 / 20))


def test_share_bound_is_exact():
    """At the bound, what was seen or more has a probability of exactly 1 - confidence."""
    low = share_lower(17, 24, 0.9)
    tail = sum(math.comb(24, k) * low**k * (1 - low) ** (24 - k) for k in range(17, 25))
    assert tail == pytest.approx(0.1)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, size: rng.beta(9, 1, size),
        lambda rng, size: rng.beta(0.5, 0.5, size),
        lambda rng, size: (rng.random(size) < 0.95).astype(float),
        lambda rng, size: 1 - 0.5 * (rng.random(size) < 0.02),
    ],
    ids=["near 0.9", "at both ends", "right or wrong", "rarely half"],
)
@pytest.mark.parametrize("size", [12, 60])
def test_means_are_above_their_bound(draw, size):
    """At 80 %, of 200 repetitions at most 58 may miss: more are a chance of 1 in 1000."""
    rng = np.random.default_rng(0)
    mean = draw(rng, 10**5).mean()
    missed = sum(mean_lower(draw(rng, size), 0.8) > mean for _ in range(200))
    assert missed <= 58


def test_a_stake_is_laid_before_its_score_is_seen():
    """Or the bound is none."""
    scores = np.linspace(0.2, 0.9, 12)
    for index in range(12):
        other = scores.copy()
        other[index:] = 0.0
        assert (_bets(scores, 3.0)[: index + 1] == _bets(other, 3.0)[: index + 1]).all()
    assert len(set(_bets(scores, 3.0))) > 6


def test_mean_bound_is_worth_having():
    """Scores that vary little: much nearer than a bound that knows nothing of their variance."""
    rng = np.random.default_rng(1)
    scores = rng.normal(0.9, 0.02, 50).clip(0, 1)
    hoeffding = scores.mean() - math.sqrt(math.log(1 / 0.05) / (2 * 50))
    assert hoeffding + 0.09 < mean_lower(scores) < scores.mean()
    low, high = mean_interval(scores)
    assert low < scores.mean() < high and high - low < 0.2


def test_all_right():
    assert mean_lower([1.0] * 100) > 0.96
    assert mean_lower([]) == 0.0 and mean_interval([]) == (0.0, 1.0)
    assert mean_lower([0.0] * 5) < 1e-6


def test_samples_needed():
    """The smallest number whose bound reaches the share."""
    for fidelity, confidence in ((0.998, 0.95), (0.9, 0.95), (0.5, 0.5), (0.99, 0.9)):
        count = samples_needed(fidelity, confidence)
        assert share_lower(count, count, confidence) >= fidelity - 1e-12
        assert count == 1 or share_lower(count - 1, count - 1, confidence) < fidelity
    assert samples_needed(0.998) == 1497


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_wrong_confidence(confidence):
    message = f"confidence: expected a number above 0 and below 1, got {confidence}"
    for call in (lambda c: share_interval(1, 2, c), lambda c: mean_interval([0.5], c)):
        with pytest.raises(ValueError, match=message):
            call(confidence)
    with pytest.raises(ValueError, match=message):
        samples_needed(0.9, confidence)


def test_wrong_numbers():
    with pytest.raises(ValueError, match="right: expected an integer from 0 to 2, got 3"):
        share_interval(3, 2)
    for wrong in (1.5, float("nan")):
        with pytest.raises(ValueError, match="scores: expected numbers from 0 to 1, got"):
            mean_lower([0.5, wrong])
    with pytest.raises(ValueError, match="fidelity: expected a number above 0 and below 1, got 1"):
        samples_needed(1)
