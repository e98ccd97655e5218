"""Time and memory of whole iterations, as a user sees them.

What is timed is a loop: one synchronisation before all iterations and one behind them, so that the
host may be ahead of the device. Beside that stand the times of single iterations, on CUDA by
events.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


class Budget:
    """Seconds that may be spent; when they are over nothing new is begun."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self._end - time.perf_counter()


def timed(call: Callable[[], Any], count: int, device: torch.device) -> tuple[float, list[float]]:
    """(mean wall seconds, milliseconds of every call) of `count` calls one behind the other."""
    marks: list[Any] = []

    def mark() -> None:
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    synchronize(device)
    start = time.perf_counter()
    mark()
    for _ in range(count):
        call()
        mark()
    synchronize(device)
    wall = (time.perf_counter() - start) / count
    pairs = list(zip(marks, marks[1:]))
    if device.type == "cuda":
        return wall, [begin_.elapsed_time(end) for begin_, end in pairs]
    return wall, [1e3 * (end - begin_) for begin_, end in pairs]


def figures(wall: float, each: list[float]) -> dict[str, Any]:
    """Milliseconds: the mean of the wall clock, and of single iterations median, p20 and p80."""
    fifths = statistics.quantiles(each, n=5, method="inclusive") if len(each) > 1 else each * 4
    return {
        "wall_ms": 1e3 * wall,
        "median_ms": statistics.median(each),
        "p20_ms": fifths[0],
        "p80_ms": fifths[-1],
        "iterations": len(each),
    }


def peak_gb(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 1e9


def release(device: torch.device) -> None:
    """Give back what the last method has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
