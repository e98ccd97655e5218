"""The loop between worker processes and the disk: clips to the models, results to rows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from lvspec.captioning.alike import ALIKE, Pattern
from lvspec.captioning.meter import Meter
from lvspec.captioning.preparing import Inputs, Job, Prepared, reason
from lvspec.captioning.rows import Row, caption_row, error_row
from lvspec.captioning.workers import Workers
from lvspec.engine.decoder import Decoder
from lvspec.engine.errors import GenerationInterrupted
from lvspec.engine.result import Generation
from lvspec.evaluation.samples import Sample

_PATIENCE = 0.5
"""Seconds between looks at whether to stop, while there is nothing to do."""

Prompt = tuple[Inputs, Inputs | None]


class CaptionsStopped(RuntimeError):
    """Clip after clip failed in the same way; each has its row."""


def stop_at_a_pattern(pattern: Pattern, row: Row) -> None:
    """Count a row.

    Raises:
        CaptionsStopped: It is the last of `ALIKE` that failed in the same way.
    """
    error = pattern.add(row["error"], row["video"])
    if error is not None:
        raise CaptionsStopped(
            f"captions: expected clips that differ in what is wrong with them, got {ALIKE} in "
            f"a row that fail with: {error} (each has its row; --retry-failed does them again)"
        )


class _UnderWay(NamedTuple):
    """A clip that was handed to the models."""

    sample: Sample
    prompt: Prompt
    warnings: tuple[str, ...]
    start: float


class Loop:
    """Captions samples, one row each.

    Args:
        decoder: Of the models.
        device: Where its inputs go.
        workers: Who prepares clips.
        settings: Digest for the rows.
        put: Takes a row.
        meter: Told how the time is spent.
        should_stop: Asked again and again; True: what is under way is finished, and that is all.
    """

    def __init__(
        self,
        decoder: Decoder,
        device: torch.device,
        workers: Workers,
        settings: str,
        put: Callable[[Row], None],
        meter: Meter,
        should_stop: Callable[[], bool],
    ) -> None:
        self._decoder, self._device, self._workers = decoder, device, workers
        self._settings, self._put_row, self._meter = settings, put, meter
        self._should_stop = should_stop
        self._waiting: deque[Sample] = deque()
        self._given: dict[int, Sample] = {}
        self._num_given = 0
        self._under_way: dict[int, _UnderWay] = {}
        self._is_short = False
        self._pattern = Pattern()

    def run(self, samples: Sequence[Sample]) -> None:
        """A row for each, in any order.

        Raises:
            CaptionsStopped: `ALIKE` clips in a row failed in the same way.
            GenerationInterrupted: Ctrl-C; what was under way is lost.
            NotWritten: A row cannot be written.
        """
        self._waiting.extend(samples)
        # How long chains are is chosen when a call begins: from a guess, until some have ended.
        engine = self._decoder.engine
        is_guess = engine.choice is not None and not engine.choice.is_settled
        most = len(engine.places) if is_guess else None
        while (self._waiting or self._given) and not self._should_stop():
            results = self._decoder.generate_many(
                self._prompts(most), ordered=False, return_exceptions=True
            )
            most = None
            try:
                for result in results:
                    self._tick()
                    self._put(self._row(self._under_way.pop(result.index), result))
            except (GenerationInterrupted, CaptionsStopped, OSError):
                raise
            except Exception:  # of HF's, torch's or the device's: whose it was is not known
                if not self._under_way:
                    raise
                self._one_by_one()

    def _prompts(self, most: int | None) -> Iterator[Prompt | None]:
        """Inputs as they are ready; None while there are none and something is under way.

        Args:
            most: Inputs in all; None: those of all clips.
        """
        index = 0
        while index != most and not self._should_stop():
            self._feed()
            if not self._given:
                break
            prepared = self._take()
            if prepared is None:
                if self._under_way:
                    yield None
                continue
            prompt = self._moved(prepared)
            if prompt is not None:
                sample = self._given.pop(prepared.number)
                start = time.perf_counter()
                self._under_way[index] = _UnderWay(sample, prompt, prepared.warnings, start)
                index += 1
                yield prompt
        self._tick()
        self._is_short = False

    def _feed(self) -> None:
        while self._waiting and self._workers.wants_more:
            sample = self._waiting.popleft()
            self._given[self._num_given] = sample
            self._workers.give(Job(self._num_given, sample.video, sample.prompt))
            self._num_given += 1

    def _take(self) -> Prepared | None:
        """A clip that is ready; waited for, for a while, where nothing else is to be done."""
        self._tick()
        prepared = self._workers.take(0 if self._under_way else _PATIENCE)
        self._is_short = True
        self._tick()
        self._is_short = prepared is None
        if prepared is not None:
            self._meter.begin()
        return prepared

    def _moved(self, prepared: Prepared) -> Prompt | None:
        """Inputs on the device; None if there are none, which is written down."""
        error = prepared.error
        if error is None:
            try:
                target, *draft = (
                    {name: tensor.to(self._device) for name, tensor in each.items()}
                    for each in prepared.inputs
                )
                return target, (draft[0] if draft else None)
            except torch.OutOfMemoryError as failure:
                error = reason(failure)
        self._put(error_row(self._given.pop(prepared.number), error, self._settings))
        return None

    def _one_by_one(self) -> None:
        """What was under way when something broke, each by itself: the others need not suffer."""
        for index in list(self._under_way):
            done = self._under_way[index]
            inputs, draft_inputs = done.prompt
            result: Generation | Exception
            try:
                result = self._decoder.generate(inputs, draft_inputs=draft_inputs)
            except Exception as error:
                result = error
            self._tick()
            del self._under_way[index]
            self._put(self._row(done, result))

    def _row(self, done: _UnderWay, result: Generation | Exception) -> Row:
        if isinstance(result, Exception):
            return error_row(done.sample, reason(result), self._settings)
        seconds = time.perf_counter() - done.start
        return caption_row(done.sample, result, seconds, done.warnings, self._settings)

    def _put(self, row: Row) -> None:
        self._meter.count(row)
        start = time.perf_counter()
        self._put_row(row)
        self._meter.wrote(time.perf_counter() - start)
        stop_at_a_pattern(self._pattern, row)

    def _tick(self) -> None:
        self._meter.advance(len(self._under_way), is_short=self._is_short)
