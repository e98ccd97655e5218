"""Scenes to pixels, to MP4, and to what each patch shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pairs_small.scenes import Blend, Scene, Setting
from torch import Tensor

from lvspec.shapes.clips import coverage
from lvspec.shapes.data import IGNORE, merge_labels
from lvspec.shapes.world import TEMPORAL
from lvspec.video.writing import write_video

FPS = 2  # what the models sample: one second for a pair of frames


def _mixed(blend: Blend, parts: dict[str, np.ndarray]) -> np.ndarray:
    return (1 - blend.weight) * parts[blend.value] + blend.weight * parts[blend.other]


def frames(scene: Scene, setting: Setting) -> np.ndarray:
    """All frames without grain, uint8 `[num_frames, height, width, 3]`."""
    colors = {name: np.float32(value) for name, value in setting.colors.items()}
    grounds = {name: np.float32(value) for name, value in setting.backgrounds.items()}
    video = np.empty((setting.num_frames, setting.height, setting.width, 3), np.uint8)
    video[:] = _mixed(scene.background, grounds).round()
    for shape, kinds in zip(scene.shapes, setting.kinds, strict=True):
        size = setting.sizes[shape.size]
        covered = _mixed(shape.kind, {k: coverage(figure, size) for k, figure in kinds.items()})
        color = _mixed(shape.color, colors)
        for frame, (x, y) in zip(video, shape.corners(setting), strict=True):
            region = frame[y : y + size, x : x + size]
            region[:] = (region + covered * (color - region)).round()
    return video


def write_clip(scene: Scene, setting: Setting, path: Path, grain: float, seed: int) -> None:
    """Write the scene as an MP4 of two frames a second, with `grain` grey levels of noise."""
    rng = np.random.default_rng(seed)
    clean = frames(scene, setting).astype(np.float32)
    noisy = clean + grain * rng.standard_normal(clean.shape, np.float32)
    video = torch.from_numpy(noisy.clip(0, 255).round().astype(np.uint8))
    write_video(path, video, fps=FPS, pixel_format="yuv444p", quality=8)


def label_classes(setting: Setting) -> tuple[int, ...]:
    """Values of: whether a shape is there, colour, kind, size, direction (0: at rest), ground."""
    color, kind, size, direction, background = (len(v) for v in setting.values.values())
    return 2, color, kind, size, 1 + direction, background


def patch_labels(shown: list[Scene], setting: Setting) -> Tensor:
    """What each patch shows, as captions say it: int64 `[B, video tokens, 4, 6]`.

    The last axis is as in `label_classes`. Where no shape is the four in the middle are IGNORE:
    with a colour for nothing most of the loss would be about nothing. A direction is that of the
    pair of frames.
    """
    values = setting.values
    rows, columns = setting.height // setting.patch, setting.width // setting.patch
    labels = np.full((len(shown), setting.num_pairs, rows, columns, 6), IGNORE, np.int64)
    labels[..., 0] = 0
    for scene, label in zip(shown, labels, strict=True):
        said = dict(scene.said)
        label[..., 5] = values["background"].index(said["background"])
        for index, shape in enumerate(scene.shapes):
            width = setting.sizes[shape.size] // setting.patch
            color, kind, size = (
                values[name].index(said[f"{name}{index}"]) for name in ("color", "kind", "size")
            )
            corners = shape.corners(setting)[::TEMPORAL]
            for pair, (heading, corner) in enumerate(zip(shape.headings, corners, strict=True)):
                x, y = (place // setting.patch for place in corner)
                way = 0 if heading is None else 1 + values["direction"].index(heading)
                label[pair, y : y + width, x : x + width, :5] = (1, color, kind, size, way)
    return merge_labels(labels)
