"""How long passes of a pair of models take, measured before anything is decoded."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch._subclasses import FakeTensor

from lvspec import ops
from lvspec.engine.graph import CudaCapturer, models_obstacle
from lvspec.engine.stats import PhaseTimer
from lvspec.models.head import draft_head
from lvspec.models.holding import held
from lvspec.models.model import Model
from lvspec.phases.draft import DraftSource
from lvspec.phases.draft.chain import PIECE
from lvspec.phases.draft.passes import GoneOnChain, run_phase
from lvspec.tree import chain_ancestors
from lvspec.warmup import warming_up

ROWS = (13, 25)
"""Slots of the passes of the target that are timed; a line through both is what a pass takes."""
CONTEXT = 128
"""Positions before those slots."""

_WARM_UP, _ROUNDS, _FASTEST = 4, 15, 5
_Call = Callable[[], object]


@dataclass(frozen=True)
class Pace:
    """Seconds of an iteration for one batch.

    Attributes:
        step: Of a step of the draft over one row of each sequence.
        base, row: Of a pass of the target over n rows of each: `base + n * row`.
        rest: Of what every iteration has besides, be its chain long or short.
    """

    step: float
    base: float
    row: float
    rest: float = 0.0

    @property
    def cost_ratio(self) -> float:
        """A step of the draft in iterations that verify one row and draft nothing."""
        return self.step / (self.base + self.row + self.rest)

    @property
    def row_ratio(self) -> float:
        """What a further row of the target adds, in the same."""
        return self.row / (self.base + self.row + self.rest)


@warming_up()
def measure_pace(
    target: Model, source: DraftSource, *, batch_size: int, scores: bool, capture: bool
) -> Pace | None:
    """Time passes as they are run: on a GPU as CUDA graphs.

    Args:
        target: Who verifies.
        source: Who drafts.
        batch_size: Sequences of a pass.
        scores: Whether a pass of the target leaves masses and peaks.
        capture: Whether iterations are to be CUDA graphs.

    Returns:
        None where it cannot be known: weights without data, or, with a warning, a pass that fails.
    """
    models = [target] if source.model is target else [target, source.model]
    if not all(_has_data(model) for model in models):
        return None
    try:
        with _on(target.device), held(models), target.active(), source.model.active():
            is_graph = capture and models_obstacle(models) is None
            step = _step(source, batch_size)
            passes = [_pass(target, batch_size, rows, scores) for rows in ROWS]
            step_seconds, few, many = _seconds([step, *passes], target.device, is_graph)
    except Exception as error:  # whatever it is: a run without a measurement says the same
        warnings.warn(
            "lvspec: gamma: expected passes that can be timed, to choose by, and goes by the bytes "
            f"of the weights instead: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    row = max((many - few) / (ROWS[1] - ROWS[0]), 0.0)
    return Pace(step_seconds / PIECE, max(few - row * ROWS[0], 0.0), max(row, 1e-12))


def _has_data(model: Model) -> bool:
    weights = model.text.parameters()
    return not any(isinstance(x, FakeTensor) or x.device.type == "meta" for x in weights)


def _on(device: torch.device) -> torch.cuda.device | nullcontext:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _step(source: DraftSource, batch_size: int) -> _Call:
    """A piece of a chain, as `ModelDrafter` runs it."""
    model = source.model
    head = draft_head(model.hf.lm_head, source.shared_vocab, source.draft_vocab)
    cache = model.new_cache(batch_size=batch_size, capacity=CONTEXT + PIECE + 1, num_slots=2)
    last = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)

    def call() -> object:
        cache.kv_len.fill_(CONTEXT)
        return run_phase(GoneOnChain(head, PIECE), model, cache, last, cache.kv_len)

    return call


def _pass(target: Model, batch_size: int, rows: int, scores: bool) -> _Call:
    """A pass of the target over a chain, and what is read of its logits."""
    device = target.device
    cache = target.new_cache(batch_size=batch_size, capacity=CONTEXT + rows, num_slots=rows)
    cache.kv_len.fill_(CONTEXT)
    tokens = torch.zeros(batch_size, rows, dtype=torch.int64, device=device)
    depths = torch.arange(rows, device=device)
    ancestors = chain_ancestors(rows, batch_size=batch_size, device=device)

    def call() -> object:
        output = target.step(tokens, depths, ancestors, cache, scores=scores)
        return ops.logit_stats(output.logits, top_k=1, workspace=cache.workspace)

    return call


def _seconds(calls: list[_Call], device: torch.device, is_graph: bool) -> list[float]:
    """Of each call the mean over those rounds that took least in all.

    In each round all calls have their turn, so a machine that is slower for a while is so for all
    of them: a ratio of one call's luckiest moment to another's says nothing.

    On a CPU the time of this thread, for others take turns with it within a pass that is long.
    """
    for call in calls * _WARM_UP:
        call()
    if device.type != "cuda":
        return _fastest(calls, _thread_seconds)
    if is_graph:
        calls = [CudaCapturer(device).capture(call)[0] for call in calls]
        for call in calls:
            call()
    return _fastest(calls, partial(_event_seconds, device=device))


def _fastest(calls: list[_Call], timed: Callable[[_Call], float]) -> list[float]:
    rounds = [[timed(call) for call in calls] for _ in range(_ROUNDS)]
    return [fmean(times) for times in zip(*sorted(rounds, key=sum)[:_FASTEST], strict=True)]


def _thread_seconds(call: _Call) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _event_seconds(call: _Call, device: torch.device) -> float:
    timer = PhaseTimer(device)
    with timer.phase("iteration"):
        call()
    return timer.seconds()["iteration"]
