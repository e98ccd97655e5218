"""Statistics of a run: counters from the reports, times from events that nobody waits for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PHASES = ("prefill", "draft", "verify", "accept", "commit", "capture", "iteration")
"""`iteration` is draft, verify, accept and commit in one, replayed as a CUDA graph, and `capture`
the making of that graph."""


class PhaseTimer:
    """Time per phase: wall clock on the CPU, CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple]] = {phase: [] for phase in PHASES}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.add(name, start, self.now())

    def add(self, name: str, start: float | torch.cuda.Event, end: float | torch.cuda.Event):
        """A span of the phase `name`, between two results of `now`."""
        self._spans[name].append((start, end))

    def now(self) -> float | torch.cuda.Event:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Seconds in each phase so far."""
        if self._on_cuda:
            torch.cuda.synchronize(self._device)
            return {
                name: sum(start.elapsed_time(end) for start, end in spans) / 1e3
                for name, spans in self._spans.items()
            }
        spans = self._spans.items()
        return {name: sum(end - start for start, end in pairs) for name, pairs in spans}


class DecodeStats:
    """Counters of one generation.

    Everything but `counts` of kinds is about passes: tokens accepted by the last pass behind the
    end of the output are included, in `tau` and `regret` too. In a batch, times of a phase are
    those of all sequences together.

    Args:
        device: Where the run takes place.
        gamma: Draft tokens per iteration at most, 0 for autoregression.
        depth: Draft tokens that one iteration can accept at most; None: `gamma`, as of a chain.

    Attributes:
        num_accepted: Accepted draft tokens of every iteration.
        num_drafted: Draft tokens that were verified, in all iterations.
        regret: Nats lost by all accepted mismatches together.
        loop: How the last iteration was run: "graph", or "eager" and why.
        parts: Of "target" and "draft", how many parts of every kind something stands in for in
            passes. Those of kinds with 0, or of a model with none, are HF's own code.
    """

    def __init__(self, device: torch.device, gamma: int, *, depth: int | None = None) -> None:
        self.gamma = gamma
        self.depth = gamma if depth is None else depth
        self.timer = PhaseTimer(device)
        self.num_accepted: list[int] = []
        self.num_drafted = 0
        self.regret = 0.0
        self.loop = "eager"
        self.parts: dict[str, dict[str, int]] = {}
        self._kinds: Tensor | None = None

    def record(self, num_accepted: int, num_slots: int, regret_used: float) -> None:
        """Count one iteration: what it accepted, of how many slots, and the nats spent by then."""
        self.num_accepted.append(num_accepted)
        self.num_drafted += num_slots - 1
        self.regret = regret_used

    def close(self, kinds: Tensor) -> None:
        """Keep the kinds of all output tokens, uint8 `[T]`."""
        self._kinds = kinds

    @property
    def num_iterations(self) -> int:
        return len(self.num_accepted)

    @property
    def tau(self) -> float:
        """Mean tokens per verify pass, the bonus token included; NaN without a pass."""
        accepted = self.num_accepted
        return sum(accepted) / len(accepted) + 1 if accepted else float("nan")

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of iterations that accepted the 1st, 2nd, ... drafted token."""
        accepted = self.num_accepted
        if not accepted:
            return []
        return [sum(a > j for a in accepted) / len(accepted) for j in range(self.depth)]

    @property
    def counts(self) -> dict[str, int]:
        """Output tokens that are exact, loose, shift, bonus; drafted tokens that were rejected."""
        names = ("exact", "loose", "shift", "bonus")
        kinds = [] if self._kinds is None else self._kinds.tolist()
        counts = {name: kinds.count(code) for code, name in enumerate(names)}
        counts["rejected"] = self.num_drafted - sum(self.num_accepted)
        return counts

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per phase."""
        return self.timer.seconds()

    def to_dict(self) -> dict[str, object]:
        """Everything as plain values."""
        return {
            "iterations": self.num_iterations,
            "gamma": self.gamma,
            "drafted": self.num_drafted,
            "tau": self.tau if self.num_accepted else None,
            "acceptance_by_position": self.acceptance_by_position,
            "counts": self.counts,
            "regret": self.regret,
            "loop": self.loop,
            "parts": self.parts,
            "seconds": self.seconds,
        }
