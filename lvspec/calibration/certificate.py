"""Which of several settings keep the stated fidelity, by captions of clips that chose none of them.

Fixed-sequence testing ("Learn then test", Angelopoulos et al. 2021): the settings are tested one
after the other, from the safest to the fastest, each at the full confidence, up to the first that
fails. That any setting which passes lacks the fidelity then has probability `1 - confidence` at
most, for the first that lacks it is the only one at which an error can begin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lvspec.calibration.candidates import Candidate
from lvspec.calibration.fidelity import Fidelity, Score
from lvspec.calibration.runs import Record, Runs, Way, regret_per_token, tau
from lvspec.calibration.timing import Captions, measured_speedups
from lvspec.evaluation.samples import Sample

COMPARED = 12
"""Clips that the target captions alone beside each candidate, for measured speeds."""


@dataclass(frozen=True)
class Measurement:
    """What a candidate did on clips that had no part in choosing it.

    Attributes:
        candidate: Settings.
        clips: Captions that were compared.
        fidelity: On them; by the metric of the calibration.
        lower_bound: What fidelity is at least, with the stated confidence.
        holds: Whether that is what was asked for.
        tau: Tokens per pass of the target.
        decode_speedup: Of decoding, over the target alone on the same clips.
        speedup: Of whole captions.
        regret: Nats per token.
        beside: Means of other metrics, by name.
    """

    candidate: Candidate
    clips: int
    fidelity: float
    lower_bound: float
    holds: bool
    tau: float
    decode_speedup: float
    speedup: float
    regret: float
    beside: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Without the settings."""
        return {name: value for name, value in vars(self).items() if name != "candidate"}


class Certifier:
    """Tests settings on captions of clips.

    Args:
        runs: Makes the captions.
        own: The clips, and the target's own captions of them.
        fidelity: What is asked for.
        beside: Metrics that are reported besides.
    """

    def __init__(
        self,
        runs: Runs,
        own: Captions,
        fidelity: Fidelity,
        beside: Sequence[Fidelity],
    ) -> None:
        self._runs, self._own = runs, {sample.id: record for sample, record in own}
        self._samples = [sample for sample, _ in own]
        self._fidelity, self._beside = fidelity, beside

    def sequence(self, candidates: Sequence[Candidate], *, to_the_end: bool) -> list[Measurement]:
        """Test one after the other up to the first that fails, which is the last that is returned.

        Args:
            candidates: In their order.
            to_the_end: Whether all are run over all clips, for what is measured of them.
        """
        found = []
        for candidate in candidates:
            found.append(self.measure(candidate, to_the_end=to_the_end))
            if not (found[-1].holds or to_the_end):
                break
        return found

    def measure(self, candidate: Candidate, *, to_the_end: bool = True) -> Measurement:
        """Caption the clips, or as many as it takes to know that the candidate fails."""

        def goes_on(captions: list[tuple[Sample, Record]]) -> bool:
            scores = self._scores(self._fidelity, captions)
            return self._fidelity.can_hold(scores, len(self._samples) - len(captions))

        way = Way(candidate.describe(), candidate)
        limit = None if to_the_end else goes_on
        captions = self._runs.captions(way, self._samples, limit, timed=COMPARED)
        alone = self._runs.alone_beside(way, self._samples)
        is_complete = len(captions) == len(self._samples)
        scores = self._scores(self._fidelity, captions)
        beside = {}
        for each in self._beside:
            values = self._scores(each, captions)
            if values:
                beside[each.metric] = each.value(values)
        return Measurement(
            candidate,
            len(scores),
            self._fidelity.value(scores),
            self._fidelity.lower_bound(scores) if is_complete else math.nan,
            is_complete and self._fidelity.holds(scores),
            tau(captions),
            *measured_speedups(captions, alone),
            regret_per_token(captions),
            beside,
        )

    def _scores(self, fidelity: Fidelity, captions: Captions) -> list[Score]:
        found = []
        for sample, record in captions:
            score = fidelity.score(sample, record, self._own[sample.id])
            if score is not None and record["error"] is not None:  # NaN in the midst of it
                score = (0.0, score[1]) if isinstance(score, tuple) else 0.0
            if score is not None:
                found.append(score)
        return found
