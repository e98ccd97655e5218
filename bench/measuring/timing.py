"""How long a call takes: cold caches, medians, and what the device can copy in the same run.

On CUDA a call is timed twice. `graph`: captured in a CUDA graph and replayed, which is what the
decoding loop pays. `calls`: from Python, launch overhead included. Between two repetitions the L2
cache is written over, and then filled by reading, so that neither the inputs nor dirty lines that
would have to be written back are in it. On the CPU it is the wall clock.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

GIB = 2**30


class Timing(NamedTuple):
    """Milliseconds of a call; `how` is graph, calls or cpu."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    how: str


def measure(
    call: Callable[[], Any], device: torch.device, *, how: str = "graph", seconds: float = 0.2
) -> Timing:
    """Time `call`, which computes on `device`.

    Args:
        call: Must do the same work every time. With `how="graph"` it must be capturable; its
            outputs may be new tensors.
        device: Where it computes.
        how: "graph" or "calls"; not looked at on the CPU.
        seconds: About how long to measure, 5 to 200 rounds.

    Raises:
        RuntimeError: `call` cannot be captured.
    """
    if device.type != "cuda":
        return _summary(_cpu_times(call, seconds), "cpu")
    with torch.cuda.device(device):
        for _ in range(3):
            call()
        run = _captured(call) if how == "graph" else call
        return _summary(_cuda_times(run, device, seconds), how)


def _summary(times: list[float], how: str) -> Timing:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[-1], len(times), how)


def _cpu_times(call: Callable[[], Any], seconds: float) -> list[float]:
    call()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 1e3 * seconds and len(times) < 200):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    kept = []  # the outputs live as long as the graph that writes them
    with torch.cuda.graph(graph):
        kept.append(call())

    def replay() -> None:
        graph.replay()
        assert kept

    return replay


def _cuda_times(run: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    def pairs(count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            # Takes the device long enough for the host to be ahead of it.
            clear_l2(device)
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    pairs(5)
    start = time.perf_counter()
    pairs(5)
    each = (time.perf_counter() - start) / 5
    return pairs(min(200, max(20, int(seconds / each))))


def clear_l2(device: torch.device) -> None:
    """Leave nothing of what a call will read in L2, and nothing that must be written back."""
    written, read = _l2_buffers(device)
    written.zero_()
    torch.amax(read)


@functools.cache
def _l2_buffers(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 128 * 2**20)
    both = torch.zeros(2, size // 4, dtype=torch.float32, device=device)
    return both[0], both[1]


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB (64 MiB on the CPU)."""
    size = GIB if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device, how="calls")
    return 2 * size / (timing.median_ms / 1e3)


@functools.cache
def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of a sum over 1 GiB (64 MiB on the CPU), which writes next to nothing."""
    size = GIB if device.type == "cuda" else 2**26
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    timing = measure(lambda: source.sum(), device, how="calls")
    return size / (timing.median_ms / 1e3)


@functools.cache
def launch_ms(device: torch.device) -> float:
    """What timing a captured kernel that does next to nothing gives: the floor of every figure."""
    one = torch.zeros(1, device=device)
    return measure(lambda: one.add_(1), device).median_ms


def device_facts(device: torch.device) -> dict[str, Any]:
    """The device and its limits as measured here."""
    facts: dict[str, Any] = {
        "device": str(device),
        "copy_gb_per_s": copy_bandwidth(device) / 1e9,
        "read_gb_per_s": read_bandwidth(device) / 1e9,
        "launch_ms": launch_ms(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": properties.total_memory / 1e9,
            "l2_mb": properties.L2_cache_size / 1e6,
            "cuda": torch.version.cuda,
        }
    return facts
