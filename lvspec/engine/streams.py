"""Streamers of a call: each gets `end()` once, whatever the end is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from transformers.generation.streamers import BaseStreamer

P = ParamSpec("P")
R = TypeVar("R")


class _Stream(BaseStreamer):
    """A streamer, and whether it was told of the end."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer, self._has_ended = streamer, False

    def put(self, value: Any) -> None:
        self._streamer.put(value)

    def end(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._streamer.end()


def ends_streamers(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose streamers get `end()` after an error too.

    Whoever reads a `TextIteratorStreamer` in another thread would wait for ever otherwise.

    Args:
        name: The keyword argument with a streamer, or a list of them with None for nobody.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def ending(*args: P.args, **kwargs: P.kwargs) -> R:
            found = kwargs.get(name)
            if found is None:
                return function(*args, **kwargs)
            is_one = not isinstance(found, (list, tuple))
            given = [found] if is_one else found
            streams = [None if streamer is None else _Stream(streamer) for streamer in given]
            kwargs[name] = streams[0] if is_one else streams
            try:
                return function(*args, **kwargs)
            except BaseException:
                for stream in streams:
                    if stream is not None:
                        with suppress(Exception):  # the first error is the one to show
                            stream.end()
                raise

        return ending

    return decorated
