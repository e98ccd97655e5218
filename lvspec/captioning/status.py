"""How far the shards of a folder are, from their files alone."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvspec.captioning.meter import Meter
from lvspec.captioning.shards import SETTINGS, Shard, lines_of, part_of
from lvspec.environment import write_json

_EVERY = 5.0
"""Seconds between two writings of a run's pace."""


class Progress:
    """Leaves a run's pace beside its rows, for `status`.

    Args:
        folder: Of the run.
        shard: Which.
        total: Samples of the shard.
        meter: Of the run.
    """

    def __init__(self, folder: Path, shard: Shard, total: int, meter: Meter) -> None:
        self._path = _pace_of(folder, shard)
        self._total, self._meter = total, meter
        self._then = time.monotonic()

    def write(self) -> None:
        """Write it.

        Raises:
            NotWritten: The disk is full, for instance.
        """
        values = {"lvspec": "pace of captions", "total": self._total, **self._meter.to_dict()}
        write_json(self._path, values, name="out")
        self._then = time.monotonic()

    def write_now_and_then(self) -> None:
        """Write it unless that was done a moment ago."""
        if time.monotonic() - self._then > _EVERY:
            self.write()


@dataclass(frozen=True)
class ShardStatus:
    """How far a shard is.

    Attributes:
        shard: Which.
        done: Samples with a caption.
        failed: Samples with an error.
        left: Samples without a row, as of the last run.
        state: "closed", "running", "stopped" (there are rows, and nobody adds any) or "not begun".
        pace: Of the last run, see `Meter.to_dict`; empty if there was none.
    """

    shard: Shard
    done: int
    failed: int
    left: int | None
    state: str
    pace: dict[str, Any]


def status(folder: str | os.PathLike) -> list[ShardStatus]:
    """Every shard of a folder.

    Raises:
        ValueError: Nothing was captioned there, or a file is damaged.
    """
    place = Path(folder)
    names = os.listdir(place) if place.is_dir() else []
    shards = {
        Shard(int(found[1]), int(found[2]))
        for name in names
        if (found := re.match(r"captions-(\d+)-of-(\d+)\.", name))
    }
    if not shards or SETTINGS not in names:
        raise ValueError(f"status: expected a folder of lvspec caption, got {folder}")
    counts = {shard.count for shard in shards}
    everyone = {Shard(index, count) for count in counts for index in range(1, count + 1)}
    return [_status_of(place, shard) for shard in sorted(everyone)]


def _status_of(folder: Path, shard: Shard) -> ShardStatus:
    path = folder / f"{shard.stem}.jsonl"
    newest: dict[str, bool] = {}
    for file in (path, part_of(path)):
        newest.update((row["id"], row["error"] is not None) for _, row in lines_of(file))
    failed = sum(newest.values())
    pace = _read(_pace_of(folder, shard))
    total = pace.pop("total", None)
    left = None if total is None else max(total - len(newest), 0)
    if part_of(path).exists():
        state = "running" if _is_locked(part_of(path)) else "stopped"
    else:
        state = "closed" if path.exists() else "not begun"
    return ShardStatus(shard, len(newest) - failed, failed, left, state, pace)


def _pace_of(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.stem}.pace.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _is_locked(path: Path) -> bool:
    """Whether a run is writing a journal."""
    try:
        import fcntl
    except ImportError:
        return False
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
