"""What an iteration costs in the loop itself, and what follows for the speed of a walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from lvspec.calibration.replay import Walk
from lvspec.calibration.runs import Record
from lvspec.evaluation.samples import Sample

Captions = Sequence[tuple[Sample, Record]]


@dataclass(frozen=True)
class Pace:
    """Costs as measured on some clips, in tokens of the target alone: how many it gives meanwhile.

    Attributes:
        alone_rest: Of what a caption takes besides, its prompt above all, without a draft.
        rest: Of the same with one.
        iterations: Of an iteration, by the length of its chain.
    """

    alone_rest: float
    rest: float
    iterations: Mapping[int, float]

    @classmethod
    def of(cls, timed: Mapping[int, tuple[Captions, Captions]]) -> Pace:
        """From captions with chains of some lengths, each beside those of the target alone.

        Medians over clips, of which the first of each is left out, where there are others: much is
        done in it for the first time.
        """
        costs, rests, alone_rests = {}, [], []
        for gamma, (drafted, alone) in timed.items():
            found = []
            for mine, other in _pairs(drafted, alone):
                token = other["decode_s"] / max(other["emitted"], 1)
                found.append(mine["decode_s"] / max(mine["iterations"], 1) / token)
                rests.append((mine["seconds"] - mine["decode_s"]) / token)
                alone_rests.append((other["seconds"] - other["decode_s"]) / token)
            if not found:
                raise ValueError("samples: expected clips whose captions can be timed, got none")
            costs[gamma] = median(found)
        return cls(median(alone_rests), median(rests), costs)

    def iteration(self, gamma: int) -> float:
        """Of an iteration: between lengths that were timed in proportion."""
        known = sorted(self.iterations)
        return float(np.interp(gamma, known, [self.iterations[length] for length in known]))

    def speedups(self, walks: Sequence[Walk], gamma: int) -> tuple[float, float]:
        """Of decoding, and of whole captions, over the target alone; expected."""
        tokens = sum(walk.num_emitted for walk in walks)
        decoding = max(sum(walk.iterations for walk in walks), 1) * self.iteration(gamma)
        whole = decoding + len(walks) * self.rest
        return tokens / decoding, (tokens + len(walks) * self.alone_rest) / whole


def measured_speedups(captions: Captions, alone: Captions) -> tuple[float, float]:
    """Of decoding, and of whole captions, over the target alone: medians over clips, see `Pace.of`.

    Args:
        captions: Of a way.
        alone: Of the target alone, of some of the same clips and in turns with it; NaN without any.
    """
    pairs = _pairs(captions, alone)
    if not pairs:
        return float("nan"), float("nan")
    decoding, whole = (
        median(m["emitted"] / m[name] / (other["emitted"] / other[name]) for m, other in pairs)
        for name in ("decode_s", "seconds")
    )
    return decoding, whole


def _pairs(captions: Captions, alone: Captions) -> list[tuple[Record, Record]]:
    """Captions of the same clips, those in which much is done for the first time left out."""
    theirs = {sample.id: record for sample, record in alone}
    pairs = [(record, theirs[sample.id]) for sample, record in captions if sample.id in theirs]
    pairs = [pair for pair in pairs if all(record["decode_s"] > 0 for record in pair)]
    return pairs[1:] or pairs
