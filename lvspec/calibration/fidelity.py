"""How much of what the target says by itself a caption keeps, and how sure that is from few clips.

Two kinds of metrics. What is compared with the target's own caption is a score from 0 to 1 of each
clip, where the target's own has 1; its mean is the fidelity. Any other metric scores both captions,
and fidelity is the mean of the one relative to the mean of the other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvspec.evaluation.intervals import mean_lower, share_lower
from lvspec.evaluation.metrics import find_metric
from lvspec.evaluation.samples import Sample

ANCHORS = "anchors"
_BINARY = ("own_choice", "own_same")
_MOST_NEEDED = 10**6

Score = float | tuple[float, float]
"""Of a clip: what is kept; or for a relative metric (the caption's, the target's own)."""
Caption = Mapping[str, Any]
"""As `Generation.to_dict` gives it; of what is compared `text` and `tokens` are enough."""


@dataclass(frozen=True)
class Fidelity:
    """A metric, what is asked of it, and with which confidence.

    Attributes:
        metric: "anchors", a name of `lvspec.evaluation.metrics.METRICS`, or `module:name`.
        wanted: The fidelity that is to be kept, above 0 and below 1.
        confidence: With which, likewise.
    """

    metric: str
    wanted: float
    confidence: float

    def __post_init__(self) -> None:
        for name in ("wanted", "confidence"):
            value = getattr(self, name)
            if not 0 < value < 1:
                name = "fidelity" if name == "wanted" else name
                raise ValueError(f"{name}: expected a number above 0 and below 1, got {value}")
        if self.metric != ANCHORS:
            find_metric(self.metric)

    @property
    def is_relative(self) -> bool:
        """Whether the metric scores the target's own caption too."""
        return self.metric != ANCHORS and not self.metric.startswith("own_")

    @property
    def is_binary(self) -> bool:
        """Whether a clip is right or wrong, nothing in between."""
        return self.metric in _BINARY

    def score(self, sample: Sample, caption: Caption, own: Caption) -> Score | None:
        """Of one clip; None where the metric says nothing of it.

        Raises:
            ValueError: A score is not from 0 to 1, or the metric failed.
        """
        if self.metric == ANCHORS:
            return anchors_kept(caption["tokens"], own["tokens"], anchors_of(own))
        metric = find_metric(self.metric)
        score = self._checked(metric(caption["text"], sample, own["text"]), sample)
        if not self.is_relative or score is None:
            return score
        of_own = self._checked(metric(own["text"], sample, own["text"]), sample)
        return None if of_own is None else (score, of_own)

    def _checked(self, score: float | None, sample: Sample) -> float | None:
        if score is not None and not 0 <= score <= 1:
            raise ValueError(
                f"metric: expected scores from 0 to 1, got {score} of {self.metric} for sample "
                f"{sample.id}"
            )
        return score

    def value(self, scores: Sequence[Score]) -> float:
        """The fidelity that these clips have; NaN of none."""
        if not scores:
            return float("nan")
        if not self.is_relative:
            return float(np.mean(scores))
        kept, of_own = np.mean(scores, axis=0)
        return float(kept / of_own) if of_own else float("nan")

    def holds(self, scores: Sequence[Score], fidelity: float | None = None) -> bool:
        """Whether these clips show the wanted fidelity, or this one.

        Of a policy without it the answer is yes with probability `1 - confidence` at most, whatever
        the scores are distributed like, if the clips are drawn like those to come, and neither
        their order nor the policy was chosen by them.
        """
        wanted = self.wanted if fidelity is None else fidelity
        if not scores:
            return False
        if self.is_binary:
            return share_lower(int(sum(scores)), len(scores), self.confidence) >= wanted - 1e-12
        if not self.is_relative:
            return mean_lower(scores, self.confidence) >= wanted - 1e-9
        # That kept >= wanted * own on the average, from 0 to 1.
        gains = [(kept + wanted * (1 - own)) / (1 + wanted) for kept, own in scores]
        return mean_lower(gains, self.confidence) >= wanted / (1 + wanted) - 1e-9

    def lower_bound(self, scores: Sequence[Score]) -> float:
        """The largest fidelity that `holds`, to within 1e-6."""
        low, high = 0.0, 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if self.holds(scores, middle) else (low, middle)
        return low

    def can_hold(self, scores: Sequence[Score], others: int) -> bool:
        """Whether these and so many clips more, all of them perfect, would show it."""
        return self.holds([*scores, *[self.perfect] * others])

    @property
    def needed(self) -> int:
        """Clips that show the wanted fidelity if every one of them is perfect; fewer cannot."""
        return _needed(self)

    @property
    def perfect(self) -> Score:
        """That of a clip on which nothing is lost."""
        return (1.0, 1.0) if self.is_relative else 1.0


@functools.lru_cache
def _needed(fidelity: Fidelity) -> int:
    most = 1
    while not fidelity.can_hold([], most):
        most *= 2
        if most > _MOST_NEEDED:
            return most
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if fidelity.can_hold([], middle) else (middle, most)
    return most


def anchors_of(own: Caption) -> list[bool]:
    """For each token of the target's own caption whether its row looked at the video.

    By the threshold that the gate found at last; all tokens where it found none.
    """
    threshold, relevance = own["stats"]["anchor_threshold"], own["relevance"]
    if threshold is None:
        return [True] * len(own["tokens"])
    return [value is not None and value >= threshold for value in relevance]


def anchors_kept(tokens: Sequence[int], own: Sequence[int], is_anchor: Sequence[bool]) -> float:
    """The share of the anchors of `own` that `tokens` has in the same places.

    The two are aligned so that most tokens are equal, of such alignments by the one that keeps most
    anchors. Without an anchor all tokens are looked at.
    """
    flags = np.asarray(is_anchor, dtype=bool)
    if not flags.any():
        flags = np.ones(len(own), dtype=bool)
    other = np.asarray(tokens, dtype=np.int64)
    # Of a longest common subsequence the length, and behind the point the anchors in it.
    unit = 1 / (len(own) + 1)
    best = np.zeros(len(other) + 1)
    for token, flag in zip(own, flags, strict=True):
        taken = best[:-1] + np.where(other == token, 1 + unit * flag, 0.0)
        best = np.maximum.accumulate(np.maximum(best, np.concatenate([[0.0], taken])))
    kept = round((best[-1] - np.floor(best[-1] + unit / 2)) / unit)
    return kept / int(flags.sum())
