"""What worker processes prepare in tests: by its name a clip is whole, broken, or deadly."""

import os
import signal
import warnings
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """A video called "die-1.mp4" kills the process, "bad-1.mp4" cannot be read.

    With "hang-1.mp4" nobody ever comes back; before that it has made a file of this name.
    """

    parts: int = 1

    def load(self):
        return lambda video, prompt: [prepared(video, prompt) for _ in range(self.parts)]


@dataclass(frozen=True)
class Stuck:
    """Nobody comes back from loading it, which has made a file."""

    path: str

    def load(self):
        hang(self.path)


@dataclass(frozen=True)
class Unloadable:
    def load(self):
        raise ImportError("expected torchvision")


def prepared(video, prompt):
    kind = os.path.basename(video).partition("-")[0]
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        hang(video)
    if kind == "bad":
        raise ValueError(f"not a video: {video}")
    if kind == "torn":
        warnings.warn_explicit("3 frames are lost", UserWarning, "x.py", 1, module="lvspec.video")
    return {"ids": torch.tensor([[len(video), len(prompt)]]), "none": torch.zeros(0, 3)}


def hang(path):
    with open(path, "x"):
        pass
    while True:  # in no system call, and deaf to whatever can be heard
        pass
