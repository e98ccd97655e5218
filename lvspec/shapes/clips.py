"""Scenes to pixels: the eight frames the model is trained on, and the MP4 a person can look at."""

from __future__ import annotations

import os
from functools import lru_cache

import numpy as np
import torch

from lvspec.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    FRAME_SIZE,
    NUM_FRAMES,
    SIZES,
    Scene,
)
from lvspec.video import write_video

CLIP_FPS = 8
FRAMES_PER_STEP = 4  # written frames per seen frame: 32 written frames, four seconds
CLIP_SCALE = 4  # written clips are 336 x 336


@lru_cache(maxsize=64)
def coverage(kind: str, size: int) -> np.ndarray:
    """How much of each pixel a shape of `size` pixels covers: float32 `[size, size, 1]`, 0 to 1."""
    samples = 8
    axis = (np.arange(size * samples) + 0.5) / (size * samples) * 2 - 1
    x, y = np.meshgrid(axis, axis)
    radius = np.hypot(x, y)
    inside = {
        "circle": radius <= 0.96,
        "square": np.maximum(abs(x), abs(y)) <= 0.82,
        "triangle": (y <= 0.9) & (abs(x) <= (y + 0.95) / 2),
        "cross": (np.minimum(abs(x), abs(y)) <= 0.28) & (np.maximum(abs(x), abs(y)) <= 0.95),
        "ring": (radius <= 0.96) & (radius >= 0.52),
    }[kind]
    blocks = inside.reshape(size, samples, size, samples).mean(axis=(1, 3))
    return blocks.astype(np.float32)[..., None]


def _draw(scene: Scene, time: float, scale: int) -> np.ndarray:
    frame = np.empty((FRAME_SIZE * scale, FRAME_SIZE * scale, 3), np.float32)
    frame[:] = BACKGROUNDS[scene.background]
    for shape in scene.shapes:
        size = SIZES[shape.size] * scale
        x, y = (round(value * scale) for value in shape.position(time))
        covered = coverage(shape.kind, size)
        region = frame[y : y + size, x : x + size]
        region += covered * (np.float32(COLORS[shape.color]) - region)
    return frame


def seen_frames(scene: Scene) -> np.ndarray:
    """The frames that uniform sampling finds in the written clip, uint8 `[8, 84, 84, 3]`."""
    frames = [_draw(scene, time, scale=1) for time in range(NUM_FRAMES)]
    return np.stack(frames).round().astype(np.uint8)


def clip_frames(scene: Scene, *, noise: float = 2.0, seed: int = 0) -> torch.Tensor:
    """All written frames, uint8 `[32, 336, 336, 3]`, with grain of `noise` grey levels."""
    rng = np.random.default_rng(seed)
    frames = []
    for index in range(NUM_FRAMES * FRAMES_PER_STEP):
        frame = _draw(scene, index / FRAMES_PER_STEP, CLIP_SCALE)
        frame += noise * rng.standard_normal(frame.shape, np.float32)
        frames.append(frame.clip(0, 255).round().astype(np.uint8))
    return torch.from_numpy(np.stack(frames))


def write_clip(scene: Scene, path: str | os.PathLike, *, seed: int = 0) -> None:
    """Write the scene as an MP4 of four seconds (32 frames of 336 x 336, with grain)."""
    # 4:2:0, which every player knows; the shapes are large enough for its coarser colours.
    frames = clip_frames(scene, seed=seed)
    write_video(path, frames, fps=CLIP_FPS, pixel_format="yuv420p", quality=14)
