"""Where the time of a run goes: whether places wait for clips, and rows for the disk."""

from __future__ import annotations

import time
from typing import Any

from lvspec.captioning.rows import Row

_NOTABLE = 0.1
"""Share of the time from which on a stage is said to limit the run."""


class Meter:
    """Counts captions, and the seconds in which somebody waited.

    The clock starts with the first clip that is ready: how long processes take to start is nobody's
    rate.

    Args:
        places: Sequences that are decoded together.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._start: float | None = None
        self._then = 0.0
        self._idle = self._starved = self._writing = 0.0
        self.captions = self.failed = self.tokens = 0

    def begin(self) -> None:
        """A clip is ready; the first one starts the clock."""
        if self._start is None:
            self._start = self._then = time.perf_counter()

    def advance(self, under_way: int, *, is_short: bool) -> None:
        """The time since the last call was spent so.

        Args:
            under_way: Sequences that were decoded.
            is_short: Whether clips were to come, and none was ready.
        """
        now = time.perf_counter()
        if self._start is None:
            return
        passed, self._then = now - self._then, now
        if is_short:
            self._starved += passed * (self._places - under_way) / self._places
            self._idle += passed if under_way == 0 else 0.0

    def count(self, row: Row) -> None:
        """A clip has its row."""
        self.captions += row["error"] is None
        self.failed += row["error"] is not None
        self.tokens += len(row["tokens"] or ())

    def wrote(self, seconds: float) -> None:
        """The loop waited for the disk."""
        self._writing += seconds

    @property
    def seconds(self) -> float:
        """Since the first clip was ready."""
        return 0.0 if self._start is None else time.perf_counter() - self._start

    @property
    def limit(self) -> str:
        """The stage that others wait for, and what helps."""
        seconds = self.seconds
        if self._starved > _NOTABLE * seconds:
            return "decode-bound: add workers"
        if self._writing > _NOTABLE * seconds:
            return "write-bound: a faster disk"
        return "model-bound"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; shares are of `seconds`.

        `idle` is the share in which no sequence was under way because no clip was ready, `empty`
        the mean share of places that stood empty for this reason.
        """
        seconds = self.seconds
        share = (lambda part: round(part / seconds, 4)) if seconds else (lambda part: None)
        return {
            "captions": self.captions,
            "failed": self.failed,
            "tokens": self.tokens,
            "seconds": round(seconds, 3),
            "captions_per_second": share(self.captions),
            "tokens_per_second": share(self.tokens),
            "idle": share(self._idle),
            "empty": share(self._starved),
            "limit": self.limit,
        }
