"""Whether the other processes of a run still live, which a collective does not tell.

A process that waits for one that is gone would wait for long: gloo may notice, NCCL inside a CUDA
graph never does. So each one counts up a number in torchrun's store, and a thread of it looks at
the others' numbers. Where one stands still, or says that it failed, this process ends: there is
nothing that it could go on with, and what it waits in cannot be interrupted.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

BEAT = 1.0
"""Seconds between two looks."""

SILENCE = 15.0
"""Seconds without a sign of life after which a process is taken for dead."""

GRACE = 3.0
"""Seconds for the error of what this process waits in, which says more than that it was ended."""


class Pulse:
    """The sign of life of this process, and its look at the others.

    Args:
        store: What all of them read and write, through a connection of this pulse's own.
        number, size: Of this process, and how many there are.
        end: What ends this process, given why.
    """

    def __init__(
        self, store: dist.Store, number: int, size: int, end: Callable[[str], None]
    ) -> None:
        self._store, self._number, self._end = store, number, end
        self._others = [other for other in range(size) if other != number]
        self._stopped = threading.Event()
        self._failed: str | None = None
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._thread = threading.Thread(target=self._run, name="lvspec pulse", daemon=True)

    @classmethod
    def begin(cls) -> Pulse:
        """The pulse of this process, through torchrun's store."""
        store, number, size = next(dist.rendezvous("env://"))
        pulse = cls(dist.PrefixStore("lvspec/pulse", store), number, size, _end)
        pulse._thread.start()
        atexit.register(pulse.stop)
        sys.excepthook = pulse._told_by(sys.excepthook)
        return pulse

    def _told_by(self, hook: Callable[..., object]) -> Callable[..., None]:
        """The hook for an error that ends this process, after the others were told of it."""

        def told(kind: type[BaseException], error: BaseException, trace: TracebackType) -> None:
            self.fail(error)
            hook(kind, error, trace)

        return told

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process cannot go on."""
        self._failed = " ".join(f"{type(error).__name__}: {error}".split())
        self._say(f"failed {self._failed}")

    def stop(self) -> None:
        """This process leaves; if it has not failed, nobody waits for it."""
        self._stopped.set()
        self._thread.join(SILENCE)

    def _run(self) -> None:
        count = 0
        while True:
            count += 1
            reason = self._look(count)
            is_over = self._stopped.wait(GRACE if reason else BEAT)
            if is_over and self._failed is None:
                self._say("done")
            elif reason is not None and not is_over:
                self._end(reason)
            if is_over or reason is not None:
                return

    def _say(self, word: str) -> None:
        try:
            self._store.set(str(self._number), word)
        except RuntimeError:  # the store's process has left, and with it whoever could read this
            return

    def _look(self, count: int) -> str | None:
        """Say that this process lives; what is wrong with the others, in words."""
        word = f"failed {self._failed}" if self._failed else f"alive {count}"
        now = time.monotonic()
        try:
            self._store.set(str(self._number), word)
            for other in self._others:
                reason = self._of(other, now)
                if reason is not None:
                    return reason
        except RuntimeError as error:
            return f"the store that torchrun keeps is gone ({error})".partition("\n")[0]
        return None

    def _of(self, other: int, now: float) -> str | None:
        word = self._store.get(str(other)) if self._store.check([str(other)]) else b""
        if word.startswith(b"failed "):
            return f"rank {other} failed: {word.decode(errors='replace')[7:]}"
        before, since = self._seen.get(other, (None, now))
        if word != before:
            self._seen[other] = (word, now)
        elif word != b"done" and now - since > SILENCE:
            return f"rank {other} gave no sign of life for {SILENCE:.0f} s"
        return None


def _end(reason: str) -> None:
    number = os.environ.get("RANK", "?")
    # The shell of a rank that is not the first has no other.
    print(f"lvspec: error: rank {number}: {reason}", file=sys.__stderr__, flush=True)
    os._exit(1)
