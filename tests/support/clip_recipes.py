"""What worker processes prepare in tests: by its name a clip is whole, broken, or deadly."""

import os
import signal
import warnings
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """A video called "die-1.mp4" kills the process, "bad-1.mp4" cannot be read."""

    parts: int = 1

    def load(self):
        return lambda video, prompt: [prepared(video, prompt) for _ in range(self.parts)]


@dataclass(frozen=True)
class Unloadable:
    def load(self):
        raise ImportError("expected torchvision")


def prepared(video, prompt):
    kind = os.path.basename(video).partition("-")[0]
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "bad":
        raise ValueError(f"not a video: {video}")
    if kind == "torn":
        warnings.warn_explicit("3 frames are lost", UserWarning, "x.py", 1, module="lvspec.video")
    return {"ids": torch.tensor([[len(video), len(prompt)]]), "none": torch.zeros(0, 3)}
