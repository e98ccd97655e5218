"""The trained pairs by name, each with its clips, its judge and what counts as an anchor there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lvspec.engine.result import Generation
from lvspec.models.loading import Pair
from lvspec.shapes import evaluation, pair
from lvspec.shapes.captions import read_attributes
from lvspec.shapes.evaluation import Clip
from lvspec.shapes.real import evaluation as real_evaluation
from lvspec.shapes.real import pair as real_pair


@dataclass(frozen=True)
class Task:
    """A trained pair and what it was trained to do.

    Attributes:
        load: The pair; takes `dtype` and `device`.
        make_clips: Clips of a split, from (pair, split, count, folder).
        token_anchors: For each new token whether the video decides it, by the caption's words.
        oracle_gate: A scorer that knows the anchors, for ablations: use it with 0.5.
        read: What a caption states: attributes to values.
        anchor_threshold: Set by hand on the calibration split, for comparison: `lvspec()` finds
            its own.
    """

    load: Callable[..., Pair]
    make_clips: Callable[[Pair, str, int, Path], list[Clip]]
    token_anchors: Callable[[Generation], list[bool]]
    oracle_gate: Callable[[Pair], Callable[..., Tensor]]
    read: Callable[[str], Mapping[str, object]]
    anchor_threshold: float


TASKS = {
    "embedded": Task(
        pair.load_embedded_pair,
        evaluation.make_clips,
        evaluation.token_anchors,
        evaluation.oracle_gate,
        read_attributes,
        pair.ANCHOR_THRESHOLD,
    ),
    "real": Task(
        real_pair.load_real_pair,
        real_evaluation.make_clips,
        real_evaluation.token_anchors,
        real_evaluation.oracle_gate,
        real_evaluation.read_attributes,
        real_pair.ANCHOR_THRESHOLD,
    ),
}


def choose(name: str) -> Task:
    """The trained pair that `--pair` names.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in TASKS:
        raise ValueError(f"--pair: expected {' or '.join(TASKS)}, got {name}")
    return TASKS[name]
