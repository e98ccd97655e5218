"""How sure a share or a mean is, from few samples: bounds that hold whatever the distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lvspec.checks import check_count, check_number

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """From `low` to `high`, both included."""

    low: float
    high: float


def share_interval(right: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Clopper and Pearson's exact interval of a share.

    Args:
        right: How many of `total` samples were right.
        total: Samples, >= 0; of none, the interval is 0 to 1.
        confidence: With which the share is within, in (0, 1).

    Raises:
        ImportError: scipy is not installed.
        ValueError: A number is out of range.
    """
    side = (1 + check_confidence(confidence)) / 2
    low = share_lower(right, total, side)
    return Interval(low, 1 - share_lower(total - right, total, side))


def share_lower(right: int, total: int, confidence: float = CONFIDENCE) -> float:
    """The lower end alone, exact: the share is below it with probability `1 - confidence` at most.

    Args:
        right, total, confidence: As for `share_interval`.
    """
    check_count("total", total, least=0)
    check_count("right", right, total, least=0)
    check_confidence(confidence)
    if right == 0:
        return 0.0
    try:
        from scipy.special import betaincinv
    except ImportError as error:
        raise ImportError(
            "intervals: expected scipy, which is not installed (pip install 'lvspec[evaluate]')"
        ) from error
    return float(betaincinv(right, total - right + 1, 1 - confidence))


def mean_interval(scores: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """An interval for the mean of scores in [0, 1], see `mean_lower`.

    Args:
        scores: Independent, in [0, 1]; of none, the interval is 0 to 1.
        confidence: With which the mean is within, in (0, 1).
    """
    side = (1 + check_confidence(confidence)) / 2
    mirrored = [1 - score for score in scores]
    return Interval(mean_lower(scores, side), 1 - mean_lower(mirrored, side))


def mean_lower(scores: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """What the mean of scores in [0, 1] is below with probability `1 - confidence` at most.

    A bound by betting (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables
    by betting"): whoever bets against "the mean is m" and is right grows rich, and a mean that
    makes a bettor `1 / (1 - confidence)` times as rich is ruled out. Half of the stake follows
    their predictable bets, which fit the variance seen so far; the other half is always all in,
    which is best for scores that are nearly the same. Nothing is assumed of the distribution.

    Args:
        scores: Independent, in [0, 1], in an order that does not depend on them.
        confidence: In (0, 1).

    Raises:
        ValueError: A score is not in [0, 1].
    """
    check_confidence(confidence)
    found = np.asarray(scores, dtype=np.float64)
    outside = found[~((found >= 0) & (found <= 1))]
    if outside.size:
        raise ValueError(f"scores: expected numbers from 0 to 1, got {outside[0]}")
    log_wanted = -math.log1p(-confidence)
    bets = _bets(found, log_wanted)
    low, high = 0.0, 1.0
    # Wealth falls with the mean that it is bet against.
    for _ in range(50):
        middle = (low + high) / 2
        if _log_wealth(found, bets, middle) >= log_wanted:
            low = middle
        else:
            high = middle
    return low


def samples_needed(fidelity: float, confidence: float = CONFIDENCE) -> int:
    """How many samples, all of them right, show a share of at least `fidelity`.

    Fewer cannot, whatever is measured on them.

    Args:
        fidelity: The share, in (0, 1).
        confidence: In (0, 1).
    """
    check_confidence(confidence)
    check_number("fidelity", fidelity)
    if not 0 < fidelity < 1:
        raise ValueError(f"fidelity: expected a number above 0 and below 1, got {fidelity}")
    return math.ceil(math.log1p(-confidence) / math.log(fidelity) - 1e-9)


def check_confidence(confidence: float) -> float:
    """The number, if it can be a confidence.

    Raises:
        TypeError, ValueError: It cannot.
    """
    check_number("confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number above 0 and below 1, got {confidence}")
    return confidence


def _bets(scores: np.ndarray, log_wanted: float) -> np.ndarray:
    """The stake on each score, from those before it: their mean and variance, with a prior."""
    counts = np.arange(1, len(scores) + 1)
    means = (0.5 + np.cumsum(scores)) / (counts + 1)
    variances = (0.25 + np.cumsum((scores - means) ** 2)) / (counts + 1)
    before = np.concatenate([[0.25], variances])[: len(scores)]
    return np.sqrt(2 * log_wanted / (len(scores) * before)) if len(scores) else before


def _log_wealth(scores: np.ndarray, bets: np.ndarray, mean: float) -> float:
    """The largest wealth on the way of whoever bets that the mean is above `mean`, in (0, 1)."""
    if not len(scores):
        return 0.0
    careful = np.cumsum(np.log1p(np.minimum(bets, 0.9 / mean) * (scores - mean)))
    with np.errstate(divide="ignore"):
        all_in = np.cumsum(np.log(scores / mean))
    return float(np.logaddexp(careful, all_in).max()) - math.log(2)
