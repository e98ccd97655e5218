"""What is done once so that all that follows is fast, measured apart from the work itself.

Recording a pass, finding parts that have an operation of their own, compiling: seconds in a first
call, nothing in the others. Whoever does such a thing does it within `warming_up`; whoever measures
time leaves out what `warm_up_seconds` has grown by.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class _Clock(threading.local):
    seconds = 0.0
    is_running = False


_CLOCK = _Clock()


@contextmanager
def warming_up() -> Iterator[None]:
    """Time in here is warm-up. Also a decorator; one within another counts once."""
    if _CLOCK.is_running:
        yield
        return
    _CLOCK.is_running, start = True, perf_counter()
    try:
        yield
    finally:
        _CLOCK.seconds += perf_counter() - start
        _CLOCK.is_running = False


def warm_up_seconds() -> float:
    """Seconds of warm-up in this thread so far."""
    return _CLOCK.seconds
