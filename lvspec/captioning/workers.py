"""Processes that prepare clips ahead: how many at once, and what becomes of one that dies."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from contextlib import suppress
from multiprocessing.connection import wait
from types import TracebackType

from lvspec.captioning.preparing import Job, Prepared, Recipe, prepare_jobs, receive

_IN_HAND = 2
"""Jobs that a process has at once: the next one waits in its pipe while nobody looks."""


class Workers:
    """Prepares clips in `count` processes, which a script must be able to import (`spawn`).

    A process that dies costs the clip that it had in hand; the others are given to the next one.
    To be used with `with`.

    Args:
        recipe: What prepares a clip.
        count: Processes, >= 1.
        ahead: Clips beyond those in the hands of processes that may be prepared and not taken.
    """

    def __init__(self, recipe: Recipe, count: int, *, ahead: int) -> None:
        self._recipe = recipe
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
            job = self._jobs.popleft()
            process.jobs.append(job)
            # What cannot be sent stays with its process, whose end is seen when it is looked at.
            with suppress(OSError):
                process.connection.send(job)

    def _look(self, timeout: float) -> None:
        processes = {each.connection: each for each in self._processes if each is not None}
        if not processes:
            return
        for connection in wait(list(processes), timeout):
            process = processes[connection]
            try:
                prepared = receive(connection)
            except (EOFError, OSError):
                self._bury(process)
                continue
            process.jobs.popleft()
            self._ready.append(prepared)
        self._hand_out()

    def _bury(self, process: _Process) -> None:
        self._processes[self._processes.index(process)] = None
        ending = process.end(patience=10.0)  # its pipe is closed, so it is ending
        if process.jobs:
            number = process.jobs.popleft().number
            self._ready.append(
                Prepared(number, error=f"worker: expected a process that lives, got {ending}")
            )
        self._jobs.extendleft(reversed(process.jobs))


class _Process:
    """One of them, and the jobs that it was given and has not answered, the oldest first."""

    def __init__(self, recipe: Recipe) -> None:
        context = multiprocessing.get_context("spawn")
        self.jobs: deque[Job] = deque()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=prepare_jobs, args=(theirs, recipe), name="lvspec-decode", daemon=True
        )
        self.process.start()
        theirs.close()  # so that its end is the end of the pipe

    def end(self, *, patience: float) -> str:
        """Stop it if it still lives after these seconds, and say in words how it ended."""
        self.connection.close()
        self.process.join(patience)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        self.process.close()
        if code >= 0:
            return f"one that ended with code {code}"
        name = signal.Signals(-code).name
        return f"one that died of {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
