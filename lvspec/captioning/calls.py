"""One clip a call, from many threads: calls that wait at the same time are decoded together."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from lvspec.engine.decoder import Decoder
from lvspec.engine.result import Generation

Inputs = Mapping[str, Any]


class Done(NamedTuple):
    """A caption.

    Attributes:
        generation: The decoder's.
        seconds: From when its prompt was read to its end, beside others.
    """

    generation: Generation
    seconds: float


class _Call(NamedTuple):
    prompt: tuple[Inputs, Inputs | None]
    future: Future[Done]


class _UnderWay(NamedTuple):
    call: _Call
    start: float


class Calls:
    """Lets threads share a decoder: a place that gets free takes the call that waits longest.

    Args:
        decoder: Nobody else uses it from now on.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._waiting: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._under_way: dict[int, _UnderWay] = {}
        threading.Thread(target=self._run, name="lvspec-decode", daemon=True).start()

    def generate(self, inputs: Inputs, draft_inputs: Inputs | None = None) -> Done:
        """Decode a prompt, and wait for it.

        Raises:
            Exception: Whatever became of this prompt; of the others in the batch nothing is said.
        """
        call = _Call((inputs, draft_inputs), Future())
        self._waiting.put(call)
        return call.future.result()

    def _run(self) -> None:
        while True:
            results = self._decoder.generate_many(
                self._prompts(), ordered=False, return_exceptions=True
            )
            try:
                for result in results:
                    _settle(self._under_way.pop(result.index), result)
            except Exception:  # of HF's, torch's or the device's: whose it was is not known
                self._one_by_one()

    def _prompts(self) -> Iterator[tuple[Inputs, Inputs | None] | None]:
        """Prompts as they come; None while there are none and something is under way."""
        index = 0
        while True:
            try:
                call = self._waiting.get(block=not self._under_way)
            except queue.Empty:
                yield None
                continue
            self._under_way[index] = _UnderWay(call, time.perf_counter())
            index += 1
            yield call.prompt

    def _one_by_one(self) -> None:
        """What was under way when something broke, each by itself: the others need not suffer."""
        for index in list(self._under_way):
            each = self._under_way.pop(index)
            inputs, draft_inputs = each.call.prompt
            result: Generation | Exception
            try:
                result = self._decoder.generate(inputs, draft_inputs=draft_inputs)
            except Exception as error:
                result = error
            _settle(each, result)


def _settle(each: _UnderWay, result: Generation | Exception) -> None:
    if isinstance(result, Exception):
        each.call.future.set_exception(result)
    else:
        each.call.future.set_result(Done(result, time.perf_counter() - each.start))
