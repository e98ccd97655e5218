"""What happens between the kernels of a trace: how long a GPU does nothing.

The trace is torch.profiler's (`export_chrome_trace`). The kernels of a replayed graph have the
correlation id of its one launch, so replays are told apart without knowing what is in them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

WORK = {"kernel", "gpu_memcpy", "gpu_memset"}


class Gaps(NamedTuple):
    """Microseconds from the first kernel's beginning to the last one's end.

    `idle_us` of `span_us` nothing ran; `largest_us` is the longest such time.
    """

    span_us: float
    idle_us: float
    largest_us: float
    kernels: int

    @property
    def share(self) -> float:
        return self.idle_us / self.span_us if self.span_us else 0.0


def work(trace: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The events of a Chrome trace that keep a GPU busy, by time."""
    events = [event for event in trace["traceEvents"] if event.get("cat") in WORK]
    return sorted(events, key=lambda event: event["ts"])


def gaps(events: Iterable[Mapping[str, Any]]) -> Gaps:
    """Idle time among events that `work` returned; what overlaps is busy once."""
    events = list(events)
    if not events:
        return Gaps(0.0, 0.0, 0.0, 0)
    begin = end = events[0]["ts"]
    idle = largest = 0.0
    for event in events:
        gap = event["ts"] - end
        if gap > 0:
            idle, largest = idle + gap, max(largest, gap)
        end = max(end, event["ts"] + event["dur"])
    return Gaps(end - begin, idle, largest, len(events))


def replays(events: Iterable[Mapping[str, Any]], least: int = 20) -> list[list[Mapping[str, Any]]]:
    """The events of each launch that had `least` of them or more: replayed graphs."""
    launches = defaultdict(list)
    for event in events:
        launches[event.get("args", {}).get("correlation", -1)].append(event)
    launches.pop(-1, None)  # it is not said whose they are
    return [found for found in launches.values() if len(found) >= least]


def describe(trace: Mapping[str, Any]) -> dict[str, Any]:
    """Gaps within replays (medians over them), and over the whole trace."""
    events = work(trace)
    whole = gaps(events)
    each = [gaps(found) for found in replays(events)]
    return {
        "replays": len(each),
        "share_within": statistics.median(found.share for found in each) if each else None,
        "largest_us_within": max((found.largest_us for found in each), default=None),
        "kernels_of_a_replay": statistics.median(f.kernels for f in each) if each else None,
        "share_of_all": whole.share if whole.kernels else None,
        "span_ms": whole.span_us / 1e3,
        "kernels": whole.kernels,
    }


def by_kernel(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Time, share and count of every kernel name, the greatest first."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        found[event["name"]].append(event["dur"])
    total = sum(map(sum, found.values()))
    rows = [
        {"name": name, "ms": sum(times) / 1e3, "share": sum(times) / total, "count": len(times)}
        for name, times in found.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])
