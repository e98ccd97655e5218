"""What an iteration costs in the loop itself, and what follows for the speed of a walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

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

        The first caption of each is left out, where there are others: much is done in it for the
        first time.
        """
        costs, rests, alone_rests = {}, [], []
        for gamma, (drafted, alone) in timed.items():
            mine, other = _warm(drafted), _warm(alone)
            token = _sum(other, "decode_s") / max(_sum(other, "emitted"), 1)
            costs[gamma] = _sum(mine, "decode_s") / max(_sum(mine, "iterations"), 1) / token
            for found, records in ((rests, mine), (alone_rests, other)):
                seconds = _sum(records, "seconds") - _sum(records, "decode_s")
                found.append(seconds / len(records) / token)
        return cls(fmean(alone_rests), fmean(rests), costs)

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
    """Of decoding, and of whole captions, over the target alone, on clips that both have.

    The first clip is left out where there are others, see `Pace.of`.
    """
    theirs = {sample.id: record for sample, record in alone}
    both = [(sample, record) for sample, record in captions if sample.id in theirs]
    if not both:
        return float("nan"), float("nan")
    mine, other = _warm(both), _warm([(sample, theirs[sample.id]) for sample, _ in both])
    decoding, whole = (
        _sum(mine, "emitted") / _sum(mine, name) / (_sum(other, "emitted") / _sum(other, name))
        for name in ("decode_s", "seconds")
    )
    return decoding, whole


def _sum(records: Sequence[Record], name: str) -> float:
    return sum(record[name] for record in records)


def _warm(captions: Captions) -> list[Record]:
    records = [record for _, record in captions]
    return records[1:] or records
