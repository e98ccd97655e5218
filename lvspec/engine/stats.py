"""Statistics of a run: counters from the reports, times from events that nobody waits for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvspec.warmup import warm_up_seconds

WARM_UP_PHASES = ("warm-up", "capture")
PHASES = ("prefill", "draft", "verify", "accept", "commit", "iteration", *WARM_UP_PHASES)
"""`iteration` is draft, verify, accept and commit in one, replayed as a CUDA graph; `capture` the
making of that graph; `warm-up` what else is done once (plans of models made and checked, code
compiled, and the iterations that a CUDA graph needs before it), which no other phase includes."""

LEAST_ROWS = 32
"""Of fewer rows a share says nothing."""
_FEW, _MOST = 0.01, 0.99


class Moment(NamedTuple):
    """A point in time: of the device or host, and how much of warm-up there was until then."""

    time: float | torch.cuda.Event
    warm_up: float


class PhaseTimer:
    """Time per phase, warm-up apart: wall clock on the CPU, CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Moment, Moment]]] = {phase: [] for phase in PHASES}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.add(name, start, self.now())

    def add(self, name: str, start: Moment, end: Moment) -> None:
        """A span of the phase `name`, between two results of `now`."""
        self._spans[name].append((start, end))

    def __getstate__(self) -> dict[str, Any]:
        """Plain numbers: events of a device are of this process alone."""
        start = Moment(0.0, 0.0)
        spans = {name: [(start, Moment(seconds, 0.0))] for name, seconds in self.seconds().items()}
        return {"_device": torch.device("cpu"), "_on_cuda": False, "_spans": spans}

    def now(self) -> Moment:
        if not self._on_cuda:
            return Moment(time.perf_counter(), warm_up_seconds())
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return Moment(event, warm_up_seconds())

    def seconds(self) -> dict[str, float]:
        """Seconds in each phase so far."""
        if self._on_cuda:
            torch.cuda.synchronize(self._device)
        found, apart = dict.fromkeys(PHASES, 0.0), 0.0
        for name, spans in self._spans.items():
            for start, end in spans:
                warm_up = end.warm_up - start.warm_up
                # A device that waits for the host meanwhile has the same between its events.
                found[name] += max(self._between(start, end) - warm_up, 0.0)
                apart += warm_up
        found["warm-up"] += apart
        return found

    def _between(self, start: Moment, end: Moment) -> float:
        return start.time.elapsed_time(end.time) / 1e3 if self._on_cuda else end.time - start.time


class DecodeStats:
    """Counters of one generation.

    What is said of tokens is said of those that are output: where the last pass accepted more than
    was asked for, or a stop cut it, the rest does not count in `num_accepted`, `tau`, `regret` and
    `num_anchors`. What the target said of drafted tokens (`num_drafted`, `acceptance_by_position`,
    rejected ones) is about whole passes. In a batch, times of a phase are those of all sequences
    together.

    Args:
        device: Where the run takes place.
        gamma: Draft tokens per iteration at most, 0 for autoregression.
        depth: Draft tokens that one iteration can accept at most; None: `gamma`, as of a chain.
        generation_config: What of the target's generation config is applied to its logits.
        gamma_choice: Why `gamma` is what it is, see `GammaChoice.to_dict`; None: it was said.

    Attributes:
        num_accepted: Of every iteration the tokens that it gave, less one: the accepted draft
            tokens before its bonus token, or before the last that was output.
        num_drafted: Draft tokens that were verified, in all iterations.
        num_passed: Of these the accepted ones, whether or not they are output.
        num_tested: Of these the accepted ones, and of each iteration the one behind them; what
            stands behind that is not known.
        regret: Nats lost by all accepted mismatches together.
        is_gated: Whether visual relevance decides what may be loose.
        is_text: Whether the prompt has no image or video token; a gated policy is strict then.
        is_calibrating: Whether the threshold is found in the sequence's own rows.
        threshold: Relevance from which on rows were anchors, in the last iteration; -inf: all of
            them; None without a gate or an iteration.
        num_strict: Iterations in which no threshold was found, so that they were strict.
        num_anchors: Output tokens predicted by rows that the gate held for anchors, of those that
            came from passes; 0 without a gate.
        num_warm_up_tokens: Output tokens of iterations that count as warm-up.
        generation_config: As given: settings by name, empty where nothing of it is applied.
        loop: How the last iteration was run: "graph", or "eager" and why.
        parts: Of "target" and "draft": "layers" that lvspec's own pass runs (0: the pass is HF's),
            modules that it calls as they are ("called"), and weights that it reads from copies in
            16 bits ("compact").
        passes: Whose code ran passes of "target" and "draft": "own: one operation" (C++), "own", or
            "HF's" and why; of a target that several processes share which part of it this one ran.
        draft_vision: Whose vision features the draft read the prompt with: "the target's", which
            has the same tower, or "its own" and why; None where it saw nothing.
    """

    def __init__(
        self,
        device: torch.device,
        gamma: int,
        *,
        depth: int | None = None,
        generation_config: Mapping[str, Any] | None = None,
        gamma_choice: Mapping[str, Any] | None = None,
    ) -> None:
        self.gamma = gamma
        self.gamma_choice = None if gamma_choice is None else dict(gamma_choice)
        self.depth = gamma if depth is None else depth
        self.generation_config = dict(generation_config or {})
        self.timer = PhaseTimer(device)
        self.num_accepted: list[int] = []
        self.num_drafted = 0
        self.num_tested = 0
        self.regret = 0.0
        self.is_gated = False
        self.is_text = False
        self.is_calibrating = False
        self.threshold: float | None = None
        self.num_strict = 0
        self.num_anchors = 0
        self.num_warm_up_tokens = 0
        self.loop = "eager"
        self.parts: dict[str, dict[str, int]] = {}
        self.passes: dict[str, str] = {}
        self.draft_vision: str | None = None
        self._passed: list[int] = []
        self._kinds: Tensor | None = None

    def add(
        self,
        num_accepted: int,
        num_slots: int,
        regret_used: float,
        *,
        num_tokens: int | None = None,
        num_anchors: int = 0,
        threshold: float | None = None,
        is_warm_up: bool = False,
    ) -> None:
        """Count one iteration.

        Args:
            num_accepted: Draft tokens that the target let pass.
            num_slots: Slots that were verified, the root included.
            regret_used: Nats spent by then, for what is output.
            num_tokens: Tokens of it that are output, >= 1; None: all, the bonus token included.
            num_anchors: How many of these had an anchor's row.
            threshold: Relevance from which on a row was an anchor.
            is_warm_up: Whether its time is warm-up.
        """
        num_tokens = num_accepted + 1 if num_tokens is None else num_tokens
        self._passed.append(num_accepted)
        self.num_accepted.append(num_tokens - 1)
        self.num_drafted += num_slots - 1
        self.num_tested += min(num_accepted + 1, num_slots - 1)
        self.regret = regret_used
        self.num_anchors += num_anchors
        if self.is_gated:
            self.threshold = threshold
            self.num_strict += self.is_calibrating and threshold == -math.inf
        self.num_warm_up_tokens += num_tokens if is_warm_up else 0

    def close(self, kinds: Tensor) -> None:
        """Keep the kinds of all output tokens, uint8 `[T]`."""
        self._kinds = kinds

    @property
    def num_iterations(self) -> int:
        return len(self.num_accepted)

    @property
    def num_passed(self) -> int:
        return sum(self._passed)

    @property
    def num_emitted(self) -> int:
        """Output tokens that came from passes: all but the first, which is the prompt's."""
        return sum(self.num_accepted) + len(self.num_accepted)

    @property
    def tau(self) -> float:
        """Mean output tokens per verify pass, the bonus token included; NaN without a pass."""
        return self.num_emitted / self.num_iterations if self.num_accepted else float("nan")

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of iterations that accepted the 1st, 2nd, ... drafted token."""
        passed = self._passed
        if not passed:
            return []
        return [sum(a > j for a in passed) / len(passed) for j in range(self.depth)]

    @property
    def counts(self) -> dict[str, int]:
        """Output tokens that are exact, loose, shift, bonus; drafted tokens that were rejected."""
        names = ("exact", "loose", "shift", "bonus")
        kinds = [] if self._kinds is None else self._kinds.tolist()
        counts = {name: kinds.count(code) for code, name in enumerate(names)}
        counts["rejected"] = self.num_drafted - self.num_passed
        return counts

    @property
    def anchor_share(self) -> float | None:
        """Share of output tokens with an anchor's row; None without a gate or a pass."""
        if not self.is_gated or self.is_text or not self.num_emitted:
            return None
        return self.num_anchors / self.num_emitted

    @property
    def gate(self) -> str:
        """What the visual gate did, in a word or two.

        "none": the policy has none. "strict": there was nothing visual in the prompt, so nothing
        but the target's own tokens was accepted. "not found": a sequence of `LEAST_ROWS` tokens or
        more had no two kinds of rows to tell apart, and was strict likewise. "flags nothing",
        "flags everything": fewer than 1 % or more than 99 % of `LEAST_ROWS` rows or more were
        anchors, so the threshold is not for this pair. "on": otherwise.
        """
        if not self.is_gated:
            return "none"
        if self.is_text:
            return "strict"
        if self.is_calibrating and self.num_strict == self.num_iterations:
            return "not found" if self.num_emitted >= LEAST_ROWS else "on"
        share = self.anchor_share
        if share is None or self.num_emitted < LEAST_ROWS or _FEW <= share <= _MOST:
            return "on"
        return "flags nothing" if share < _FEW else "flags everything"

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per phase."""
        return self.timer.seconds()

    def to_dict(self) -> dict[str, object]:
        """Everything as plain values."""
        return {
            "iterations": self.num_iterations,
            "gamma": self.gamma,
            "gamma_choice": self.gamma_choice,
            "drafted": self.num_drafted,
            "tau": self.tau if self.num_accepted else None,
            "acceptance_by_position": self.acceptance_by_position,
            "counts": self.counts,
            "regret": self.regret,
            "gate": self.gate,
            "anchor_share": self.anchor_share,
            "anchor_threshold": _finite(self.threshold),
            "strict_iterations": self.num_strict,
            "loop": self.loop,
            "parts": self.parts,
            "passes": self.passes,
            "draft_vision": self.draft_vision,
            "generation_config": {k: _plain(v) for k, v in self.generation_config.items()},
            "seconds": self.seconds,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """For JSON; a setting that is an object of HF's is shown as it prints."""
    is_plain = isinstance(value, (bool, int, float, str, list, tuple))
    return value if is_plain else str(value)
