"""Processes that prepare clips ahead: how many at once, and what becomes of one that is lost."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import TracebackType

from lvspec.captioning.preparing import (
    LOADED,
    Job,
    Prepared,
    Recipe,
    deaf,
    prepare_jobs,
    receive,
)

CLIP_TIMEOUT = 600.0
"""Seconds that a clip may take unless a call says another number."""
_START_TIMEOUT = 600.0
"""Seconds that a process may take to start and to load its recipe."""
_IN_HAND = 2
"""Jobs that a process has at once: the next one waits in its pipe while nobody looks."""
_FAREWELL = 10.0
"""Seconds in which a process that was killed ends, unless the kernel holds it."""


class Workers:
    """Prepares clips in `count` processes, which a script must be able to import (`spawn`).

    A process that dies costs the clip that it had in hand, and so does one that hangs, which is
    killed; the others are given to the next one. To be used with `with`.

    Args:
        recipe: What prepares a clip.
        count: Processes, >= 1.
        ahead: Clips beyond those in the hands of processes that may be prepared and not taken.
        timeout: Seconds after which a process hangs that has not prepared a clip.
    """

    def __init__(
        self, recipe: Recipe, count: int, *, ahead: int, timeout: float = CLIP_TIMEOUT
    ) -> None:
        self._recipe, self._timeout = recipe, timeout
        self._processes: list[_Process | None] = [None] * count
        self._limit = count * _IN_HAND + ahead
        self._jobs: deque[Job] = deque()
        self._ready: deque[Prepared] = deque()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def outstanding(self) -> int:
        """Jobs that were given and whose results were not taken."""
        in_hand = sum(len(process.jobs) for process in self._processes if process is not None)
        return len(self._jobs) + in_hand + len(self._ready)

    @property
    def wants_more(self) -> bool:
        """Whether another job is to be given."""
        return self.outstanding < self._limit

    @property
    def pids(self) -> list[int]:
        """Of the processes that there are."""
        return [each.process.pid for each in self._processes if each is not None]

    def give(self, job: Job) -> None:
        """Have a clip prepared."""
        self._jobs.append(job)
        self._hand_out()

    def take(self, timeout: float) -> Prepared | None:
        """What was prepared first and not taken yet; None if that is nothing within this time.

        Args:
            timeout: Seconds to wait; 0 only looks.
        """
        self._look(0 if self._ready else timeout)
        return self._ready.popleft() if self._ready else None

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            if process is not None:
                process.end(patience=0.2)
        self._processes = [None] * len(self._processes)
        self._jobs.clear()
        self._ready.clear()

    def _hand_out(self) -> None:
        """Jobs to the processes that have the fewest; the one that is missing is started."""
        while self._jobs:
            loads = [0 if each is None else len(each.jobs) for each in self._processes]
            place = loads.index(min(loads))
            if loads[place] >= _IN_HAND:
                return
            process = self._processes[place]
            if process is None:
                process = self._processes[place] = _Process(self._recipe)
            process.give(self._jobs.popleft())

    def _look(self, timeout: float) -> None:
        processes = {each.connection: each for each in self._processes if each is not None}
        if not processes:
            return
        for connection in wait(list(processes), timeout):
            process = processes[connection]
            try:
                while connection.poll():  # all of it: it may be long since anybody looked
                    self._hear(process, receive(connection))
            except (EOFError, OSError):
                ending = process.end(patience=_FAREWELL)  # its pipe is closed, so it is ending
                self._bury(process, f"a process that lives, got {ending}")
        for process in processes.values():
            if process in self._processes and process.hangs(self._timeout):
                expected = process.patience(self._timeout)
                process.end(patience=0)
                self._bury(process, f"an answer within {expected:g} s, got none (it was killed)")
        self._hand_out()

    def _hear(self, process: _Process, said: Prepared | str) -> None:
        process.answered()
        if said == LOADED:
            process.is_loaded = True
            return
        process.jobs.popleft()
        self._ready.append(said)

    def _bury(self, process: _Process, expected: str) -> None:
        self._processes[self._processes.index(process)] = None
        if process.jobs:
            number = process.jobs.popleft().number
            self._ready.append(Prepared(number, error=f"worker: expected {expected}"))
        self._jobs.extendleft(reversed(process.jobs))


class _Process:
    """One of them.

    Attributes:
        jobs: That it was given and has not answered, the oldest first.
        is_loaded: Whether it has begun with the first of them.
    """

    def __init__(self, recipe: Recipe) -> None:
        context = multiprocessing.get_context("spawn")
        self.jobs: deque[Job] = deque()
        self.is_loaded = False
        self._since = time.monotonic()
        self.connection, theirs = context.Pipe()
        self.process = _Child(
            target=prepare_jobs, args=(theirs, recipe), name="lvspec-decode", daemon=True
        )
        with deaf():
            self.process.start()
        theirs.close()  # so that its end is the end of the pipe

    def give(self, job: Job) -> None:
        """Another job for it."""
        if not self.jobs:
            self._since = time.monotonic()
        self.jobs.append(job)
        # What cannot be sent stays here, until the process's end is seen when it is looked at.
        with suppress(OSError):
            self.connection.send(job)

    def answered(self) -> None:
        """It said something: what it does next begins now, or began before."""
        self._since = time.monotonic()

    def patience(self, timeout: float) -> float:
        """Seconds that what it does now may take."""
        return timeout if self.is_loaded else max(timeout, _START_TIMEOUT)

    def hangs(self, timeout: float) -> bool:
        """Whether it has had a job for longer than that."""
        return bool(self.jobs) and time.monotonic() - self._since > self.patience(timeout)

    def end(self, *, patience: float) -> str:
        """Stop it if it still lives after these seconds, and say in words how it ended."""
        self.connection.close()
        self.process.join(patience)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        if code is None:
            return "one that cannot be killed"
        self.process.close()
        if code >= 0:
            return f"one that ended with code {code}"
        name = signal.Signals(-code).name
        return f"one that died of {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


class _Child(SpawnProcess):
    """A process that nobody waits for forever, the interpreter at its end included.

    One that reads from a dead network file system may be held by the kernel, whatever is sent.
    """

    def join(self, timeout: float | None = None) -> None:
        super().join(_FAREWELL if timeout is None else timeout)
