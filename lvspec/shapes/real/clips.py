"""Scenes to pixels: the frames that the models see, and the MP4 that they are read from."""

from __future__ import annotations

import os
from functools import lru_cache

import numpy as np
import torch

from lvspec.shapes.clips import coverage
from lvspec.shapes.real.scenes import FPS, PAIR, Scene
from lvspec.shapes.scenes import BACKGROUNDS, COLORS, SIZES
from lvspec.video.writing import write_video


@lru_cache
def _dot(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The mark of a shape that has turned, as coverages: a black disc with a white one on it."""
    middle = (size - 1) / 2
    y, x = np.mgrid[:size, :size]
    distance = np.hypot(x - middle, y - middle)
    radius = max(3.0, 0.2 * size)
    return tuple(
        (reach + 0.5 - distance).clip(0, 1).astype(np.float32)[..., None]
        for reach in (radius, radius / 2)
    )


def frames(scene: Scene) -> np.ndarray:
    """All frames of the clip, uint8 `[frames, height, width, 3]`."""
    clip = scene.format
    video = np.empty((clip.frames, clip.height, clip.width, 3), np.uint8)
    video[:] = BACKGROUNDS[scene.background]
    for shape in scene.shapes:
        size = SIZES[shape.size]
        covered = coverage(shape.kind, size)
        black, white = _dot(size)
        for index, (x, y) in enumerate(shape.corners()):
            region = video[index, y : y + size, x : x + size].astype(np.float32)
            region += covered * (np.float32(COLORS[shape.color]) - region)
            if shape.turned(index // PAIR):
                region *= 1 - black
                region += white * (255 - region)
            video[index, y : y + size, x : x + size] = region.round()
    return video


def write_clip(scene: Scene, path: str | os.PathLike, *, noise: float = 2.0, seed: int = 0) -> None:
    """Write the scene as an MP4 of two frames a second, with grain of `noise` grey levels."""
    rng = np.random.default_rng(seed)
    clean = frames(scene).astype(np.float32)
    noisy = clean + noise * rng.standard_normal(clean.shape, np.float32)
    video = torch.from_numpy(noisy.clip(0, 255).round().astype(np.uint8))
    write_video(path, video, fps=FPS, pixel_format="yuv444p", quality=8)
