"""A caption as its page shows it: words, bars, frames, figures, and what is missing."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lvspec.reporting.figures import (
    Chart,
    Scale,
    acceptance_chart,
    phases,
    relevance_chart,
)
from lvspec.reporting.keyframes import MOST, Keyframe, heat_map, keyframes
from lvspec.reporting.tokens import Caption, Token

_HEAT = (0, 114, 178)


@dataclass(frozen=True)
class Frames:
    """Keyframes of a clip and how much each was looked at.

    Attributes:
        frames: In order; those without a picture have their time alone.
        mass: Of each token the attention on each frame (where there are many, on each and those
            behind it); empty where it was not written.
        missing: What is not there, and why.
    """

    frames: tuple[Keyframe, ...]
    mass: tuple[tuple[float | None, ...], ...]
    missing: tuple[str, ...] = ()

    @cached_property
    def mean(self) -> list[float]:
        """Over the caption."""
        rows = [row for row in self.mass if None not in row]
        return [sum(column) / len(rows) for column in zip(*rows)] if rows else []

    @property
    def largest(self) -> float:
        return max((x for row in self.mass for x in row if x is not None), default=1.0) or 1.0

    @property
    def heat(self) -> str:
        """Frames from top to bottom, tokens from left to right."""
        return heat_map(list(zip(*self.mass)), _HEAT)


@dataclass(frozen=True)
class CaptionView:
    """A caption and all that its section of the page says.

    Attributes:
        caption: What was read.
        number: Of the section, from 1.
        frames: Of its clip.
        name: What the section is called.
    """

    caption: Caption
    number: int
    frames: Frames
    name: str

    @property
    def words(self) -> list[list[Token]]:
        """Tokens that belong together: a word begins where there is space before it."""
        found: list[list[Token]] = []
        for token in self.caption.tokens:
            apart = token.text[:1].isspace() or (found and found[-1][-1].text[-1:].isspace())
            if not found or apart or not token.text:
                found.append([])
            found[-1].append(token)
        return found

    @cached_property
    def scale(self) -> Scale | None:
        return Scale.of(self.caption)

    def height(self, relevance: float | None) -> float | None:
        """Of a token's bar, 0 to 1."""
        return None if self.scale is None else self.scale.height(relevance)

    @property
    def speed(self) -> float | None:
        """Tokens a second, prefill included and warm-up left out."""
        found = self.caption.stats.get("seconds") or {}
        total = sum(seconds for _, seconds, _ in phases(found))
        # With a capture some tokens came from warm-up, and nobody has written how many.
        return None if not total or found.get("capture") else len(self.caption.tokens) / total

    @property
    def phases(self) -> list[tuple[str, float, float]]:
        return phases(self.caption.stats.get("seconds") or {})

    @property
    def acceptance(self) -> Chart | None:
        stats = self.caption.stats
        return acceptance_chart(stats.get("acceptance_by_position") or [], stats.get("tau"))

    @property
    def relevance(self) -> Chart | None:
        return relevance_chart([self.caption])

    @property
    def missing(self) -> list[str]:
        """What this page would show besides, and why it does not."""
        notes, result = [], self.caption.result
        if not self.caption.steps:
            notes.append(
                "There is no trace, so what was drafted and rejected, the target's best tokens and "
                "the iterations are not shown: lvspec generate --trace --json FILE writes one."
            )
        elif not result.get("vocabulary"):
            notes.append("Tokens of the trace have no text in this file: their numbers are shown.")
        if result.get("pieces") is None:
            notes.append("There was no tokenizer, so tokens are shown by their numbers.")
        if self.scale is None:
            notes.append(
                "No relevance was computed: the policy has no gate, or nothing is drafted."
            )
        return [*notes, *self.frames.missing]


def caption_view(
    caption: Caption, number: int, facts: Mapping[str, Any], name: str | None = None
) -> CaptionView:
    """The view of a caption; its clip is read where it is there.

    Args:
        caption: What was read.
        number: Of its section.
        facts: `frames` of the run, as it was asked for.
        name: What to call it; None: by its clip.
    """
    name = name or os.path.basename(caption.video) or f"caption {number}"
    return CaptionView(caption, number, _frames(caption, facts.get("frames") or {}), name)


def _frames(caption: Caption, asked: Mapping[str, Any]) -> Frames:
    written = caption.result.get("frames") or {}
    missing, mass, times = [], caption.mass, written.get("timestamps")
    if written.get("missing"):
        missing.append(f"Where attention fell is not known: {written['missing']}.")
    elif not mass:
        missing.append(
            "Where in the clip attention fell was not written (lvspec generate --trace does)."
        )
    if mass:
        mass, times = _merged(mass, times)
    found = [Keyframe(time) for time in times or ()]
    if not caption.video:
        missing.append("There are no keyframes, because no video is named.")
    else:
        options = {name: asked.get(name) for name in ("num_frames", "fps")}
        try:
            found = keyframes(caption.video, times, **options)
        except (OSError, ValueError, ImportError) as error:
            missing.append(f"There are no keyframes: {error}.")
    return Frames(tuple(found), tuple(map(tuple, mass)), tuple(missing))


def _merged(
    mass: Sequence[Sequence[float | None]], times: Sequence[float]
) -> tuple[list[list[float | None]], list[float]]:
    """Attention on at most `MOST` groups of frames that follow each other, each with a time."""
    size = max(1, math.ceil(len(times) / MOST))
    starts = range(0, len(times), size)
    summed = [
        [None if None in row[i : i + size] else sum(row[i : i + size]) for i in starts]
        for row in mass
    ]
    return summed, [times[i] for i in starts]
