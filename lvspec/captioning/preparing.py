"""The process beside the models: video files to the inputs of a model, one after the other.

Nothing here runs on the device, and nothing that was decoded goes through a pipe: what a processor
returns lies in memory that has no name, whose descriptor is handed over. Whoever dies leaves none
of it behind.
"""

from __future__ import annotations

import math
import mmap
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import reduction, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
LOADED = "loaded"
"""What a process says when its recipe is, before it prepares the first clip."""
_ALIGNMENT = 64
_ROLES = ("target", "draft")
_FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what a scheduler sends to all processes."""


class Job(NamedTuple):
    """One clip to prepare.

    Attributes:
        number: Tells it from others.
        video: Path of the file.
        prompt: What is asked.
    """

    number: int
    video: str
    prompt: str


class Prepared(NamedTuple):
    """What became of a job.

    Attributes:
        number: Of the job.
        inputs: The target's, and behind them the draft's where it prepares a video in another way.
        error: Why there are none.
        warnings: What is wrong with a video that can be read all the same.
    """

    number: int
    inputs: tuple[Inputs, ...] = ()
    error: str | None = None
    warnings: tuple[str, ...] = ()


class Recipe(Protocol):
    """How a process comes to what prepares a clip; pickled for it."""

    @property
    def frames(self) -> dict[str, Any]:
        """How frames are sampled, as plain values: captions depend on it."""

    def load(self) -> Callable[[str, str], Sequence[Inputs]]:
        """A function of (video, prompt), loaded where it is called."""


@dataclass(frozen=True)
class Checkpoints:
    """The processors of checkpoints.

    Attributes:
        folders: The target's, and the draft's where it prepares a video in another way.
        num_frames, fps: As for a processor.
    """

    folders: tuple[str, ...]
    num_frames: int | None = None
    fps: float | None = None

    @property
    def frames(self) -> dict[str, Any]:
        return {"num_frames": self.num_frames, "fps": self.fps}

    def load(self) -> Callable[[str, str], Sequence[Inputs]]:
        """As `Processors.load`."""
        from lvspec.models.loading import load_processor  # with transformers: seconds

        found = [load_processor(Path(f), role) for f, role in zip(self.folders, _ROLES)]
        return Processors(tuple(found), self.num_frames, self.fps).load()


@dataclass(frozen=True)
class Processors:
    """Processors that are there already, and go to each process as they are.

    Attributes:
        processors: The target's, and the draft's where it prepares a video in another way.
        num_frames, fps: As for a processor.
    """

    processors: tuple[Any, ...]
    num_frames: int | None = None
    fps: float | None = None

    @property
    def frames(self) -> dict[str, Any]:
        return {"num_frames": self.num_frames, "fps": self.fps}

    def load(self) -> Callable[[str, str], Sequence[Inputs]]:
        """One call of each processor for a clip."""
        first, *others = self.processors
        frames = {**self.frames, "device": "cpu"}

        def prepare(video: str, prompt: str) -> Sequence[Inputs]:
            found = [first(video, prompt, **frames)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is wrong with the file was said
                return [*found, *(other(video, prompt, **frames) for other in others)]

        return prepare


def prepare_jobs(connection: Connection, recipe: Recipe) -> None:
    """The life of a process: a job comes, its inputs go, until the other end is closed."""
    for number in _FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    if os.name == "posix":  # what came meanwhile is gone
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_PARENT)
    torch.set_num_threads(1)
    prepare: Callable[[str, str], Sequence[Inputs]] | None = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            job = connection.recv()
            try:
                if prepare is None:
                    prepare = recipe.load()
                    connection.send(LOADED)
                with own_warnings() as said:
                    inputs = tuple(prepare(job.video, job.prompt))
            except Exception as error:  # whatever a decoder makes of a broken file
                connection.send(Prepared(job.number, error=reason(error)))
                continue
            layout, size = _layout(inputs)
            descriptor = _written(inputs, layout, size)
            try:
                words = dict.fromkeys(" ".join(str(each.message).split()) for each in said)
                connection.send((Prepared(job.number, warnings=tuple(words)), layout, size))
                reduction.send_handle(connection, descriptor, os.getppid())
            finally:
                os.close(descriptor)
            del inputs


@contextmanager
def deaf() -> Iterator[None]:
    """A process that is started within this context hears no signal of `_FOR_THE_PARENT`.

    Until it ignores them by itself seconds pass, with imports.
    """
    if os.name != "posix":
        yield
        return
    resource_tracker.ensure_running()  # which hears them again once it has a process of its own
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def receive(connection: Connection) -> Prepared | str:
    """What a process sent: a clip, or that it has `LOADED`.

    Tensors are views of memory that is freed with the last of them.

    Raises:
        EOFError, OSError: The process is no more.
    """
    found = connection.recv()
    if isinstance(found, (Prepared, str)):
        return found
    prepared, layout, size = found
    try:
        descriptor = reduction.recv_handle(connection)
    except RuntimeError as error:  # it went between the two
        raise EOFError from error
    try:
        memory = mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
    inputs = tuple(
        {name: _view(memory, *where) for name, where in entries.items()} for entries in layout
    )
    return prepared._replace(inputs=inputs)


def reason(error: BaseException) -> str:
    """In one line; of errors that are about no argument and no file with their kind."""
    words = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) and words:
        return words
    return f"{type(error).__name__}: {words}".rstrip(": ")


_Layout = list[dict[str, tuple[torch.dtype, tuple[int, ...], int]]]


def _layout(inputs: Sequence[Mapping[str, Tensor]]) -> tuple[_Layout, int]:
    """Of each tensor dtype, shape and offset, and how many bytes all of them are."""
    layout: _Layout = []
    size = 0
    for each in inputs:
        entries = {}
        for name, tensor in each.items():
            entries[name] = (tensor.dtype, tuple(tensor.shape), size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        layout.append(entries)
    return layout, max(size, _ALIGNMENT)


def _written(inputs: Sequence[Mapping[str, Tensor]], layout: _Layout, size: int) -> int:
    """The descriptor of memory with these tensors."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("lvspec")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size)
    memory = mmap.mmap(descriptor, size)
    for each, entries in zip(inputs, layout, strict=True):
        for name, tensor in each.items():
            _view(memory, *entries[name]).copy_(tensor)
    return descriptor


def _view(memory: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


@contextmanager
def own_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Lists our own warnings; those of libraries are for their authors."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module=r"lvspec\b")
        yield said
