"""A whole iteration as one CUDA graph: captured once, replayed with one call of the host.

An iteration of two models is some thousand kernels. Launched one by one from HF's Python they leave
the GPU waiting most of the time; as a graph they follow one another. What an iteration computes is
then fixed: shapes, addresses and everything that Python decides. All that changes from iteration
to iteration is in tensors that stay where they are (`DecodeState`, `SlotCache`).
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from lvspec.models.model import Model

WARM_UP = 2
"""Iterations that are run from Python before one is captured: what is compiled, loaded or allocated
when it is first used is there then. They count like any other."""

_WARMING_UP = "eager: warming up"
_LOGGER = logging.getLogger(__name__)

Result = TypeVar("Result")


class Capturer(Protocol):
    """What captures work of a device and replays it."""

    def capture(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Capture what `run` does, without doing it.

        Returns:
            What does it, any number of times, and what `run` returned: tensors at the addresses
            that every replay writes anew.
        """

    def memory(self) -> int:
        """Bytes that are taken on the device."""


class CudaCapturer:
    """Captures the work of a CUDA device in CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def capture(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device in the meantime.
        mode = {"capture_error_mode": "thread_local"}
        # torch keeps one stream for all captures of a process, that of the first one's device.
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.device(self._device), torch.cuda.graph(graph, stream=stream, **mode):
            result = run()
        return graph.replay, result

    def memory(self) -> int:
        torch.cuda.empty_cache()  # as before a capture: what is kept for later does not count
        return torch.cuda.memory_reserved(self._device)


@dataclass(frozen=True)
class _Captured(Generic[Result]):
    replay: Callable[[], None]
    result: Result


class IterationRunner(Generic[Result]):
    """Runs iterations: from Python at first, by replaying a graph of one from then on.

    Args:
        capturer: Of the device; None: iterations are run from Python.
        reason: Why there is none.

    Attributes:
        obstacle: Why iterations are run from Python for the time being, although there is one.
        description: How iterations are run: "graph", or "eager" and why.
    """

    def __init__(self, capturer: Capturer | None, reason: str = "") -> None:
        self._capturer = capturer
        self._key: Hashable = None
        self._runs: Counter[Hashable] = Counter()
        self._captured: dict[Hashable, _Captured[Result]] = {}
        self.obstacle: str | None = None
        self.description = f"eager: {reason}" if reason else _WARMING_UP

    def is_due(self, addresses: Hashable, kind: Hashable) -> bool:
        """Whether an iteration is to be captured now. Called before each one.

        Args:
            addresses: Changes when a tensor of an iteration moves, or what Python decides from.
                Graphs of before are dropped.
            kind: What else an iteration's work depends on; each kind has a graph of its own.
        """
        if self._capturer is None:
            return False
        if self._key is None or addresses != self._key[0]:
            self._captured.clear()
            self._runs.clear()
        self._key = addresses, kind
        if self.obstacle is not None:
            self.description = f"eager: {self.obstacle}"
            return False
        self._runs[kind] += 1
        if kind in self._captured:
            return False
        self.description = _WARMING_UP
        return self._runs[kind] > WARM_UP

    def capture(self, run: Callable[[], Result]) -> None:
        """Capture an iteration, of the kind that `is_due` was told. If that cannot be, warn."""
        before, start = self._capturer.memory(), time.perf_counter()
        _LOGGER.info("capturing an iteration as a CUDA graph ...")
        try:
            replay, result = self._capturer.capture(run)
        except Exception as error:
            # Whatever it was (out of memory, an operation that cannot be captured), nothing was
            # computed, and an iteration without a graph does the same.
            self._capturer = None
            self._captured.clear()
            reason = str(error).partition("\n")[0] or type(error).__name__
            self.description = f"eager: {reason}"
            warnings.warn(
                f"lvspec: iterations are launched from Python, slower: no CUDA graph: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._captured[self._key[1]] = _Captured(replay, result)
        _LOGGER.info(
            "captured in %.1f s, %.0f MiB for it",
            time.perf_counter() - start,
            (self._capturer.memory() - before) / 2**20,
        )

    @property
    def is_warming_up(self) -> bool:
        """Whether the iteration that `is_due` was asked about is run to be captured later."""
        return self._capturer is not None and not self.is_captured

    @property
    def is_captured(self) -> bool:
        """Whether there is a graph of the kind that `is_due` was told."""
        is_there = bool(self._captured) and self._key[1] in self._captured
        return is_there and self.obstacle is None

    def replay(self) -> Result:
        """Replay that graph; returns what its capture returned, its tensors written anew."""
        captured = self._captured[self._key[1]]
        self.description = "graph"
        captured.replay()
        return captured.result


def make_runner(models: Iterable[Model], *, capture: bool, obstacle: str | None) -> IterationRunner:
    """What runs iterations of these models: on a CUDA device with graphs if nothing is against it.

    (What stands against it in the models themselves may come and go: see `models_obstacle`.)

    Args:
        models: All whose passes are part of an iteration; at least one.
        capture: Whether graphs are wanted.
        obstacle: Why an iteration cannot be captured, if the caller knows a reason.
    """
    device = next(iter(models)).device
    reasons = ["DecodeConfig(capture=False)" if not capture else None, obstacle]
    if device.type != "cuda":
        reasons.insert(0, "not on a CUDA device")
    reason = next((reason for reason in reasons if reason), None)
    if reason is not None:
        return IterationRunner(None, reason)
    return IterationRunner(CudaCapturer(device))


def models_obstacle(models: Iterable[Model]) -> str | None:
    """Why passes of the models, as they are now, cannot be captured."""
    return next(filter(None, map(_obstacle, models)), None)


def _obstacle(model: Model) -> str | None:
    if not model.is_static:
        return f"the {model.role} chooses in Python what to compute"
    weights = (*model.text.parameters(), *model.hf.lm_head.parameters())
    if {weight.device for weight in weights} - {model.device}:
        return f"the weights of the {model.role} are on several devices"
    with model.held():
        if model.watch.obstacle is not None:
            return f"the {model.role} has what a graph may leave out: {model.watch.obstacle}"
    return None
