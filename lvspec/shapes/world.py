"""What a small pair learns to describe: scenes, clips, captions, and who judges these."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lvspec.shapes.captions import Caption

MERGE, TEMPORAL = 2, 2  # patches along the side of a video token, frames of a patch


@dataclass(frozen=True)
class World:
    """Everything that training and evaluation take of a world. Scenes are whatever it draws.

    Attributes:
        name: Of the world; begins the names of its clips.
        num_frames: Frames of a clip, as the models see it.
        height: Pixels.
        width: Pixels.
        patch: Pixels along the side of a patch.
        grain: Grey levels of noise in training frames.
        prompts: Of users.
        vocabulary: All tokens in the order of their ids.
        classes: How many values each of a patch's labels may have.
        draw: A scene of the training split.
        scenes: (split, count, seed) to scenes of different descriptions.
        frames: A scene as uint8 `[num_frames, height, width, 3]`.
        patch_labels: Scenes to int64 `[B, video tokens, 4, len(classes)]`.
        caption: One of the captions of a scene.
        write_clip: A scene as MP4, from (scene, path, seed).
        judge: (text, scene) to attributes right, attributes, whole caption right.
        read: What a text states: attribute to all values stated for it.
        anchor_words: Every word that the video may decide.
    """

    name: str
    num_frames: int
    height: int
    width: int
    patch: int
    grain: float
    prompts: tuple[str, ...]
    vocabulary: Callable[[], list[str]]
    classes: tuple[int, ...]
    draw: Callable[[random.Random], Any]
    scenes: Callable[[str, int, int], list[Any]]
    frames: Callable[[Any], np.ndarray]
    patch_labels: Callable[[list[Any]], Tensor]
    caption: Callable[[Any, random.Random], Caption]
    write_clip: Callable[[Any, Path, int], None]
    judge: Callable[[str, Any], tuple[int, int, bool]]
    read: Callable[[str], dict[str, list[str]]]
    anchor_words: Callable[[], frozenset[str]]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches of a clip in time, height and width."""
        return self.num_frames // TEMPORAL, self.height // self.patch, self.width // self.patch

    @property
    def video_tokens(self) -> int:
        frames, rows, columns = self.grid
        return frames * rows * columns // MERGE**2
