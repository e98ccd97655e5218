"""Small pictures of a clip's frames, as data that stands in the page itself."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lvspec.video import read_video
from lvspec.video.processor import DEFAULT_FPS

WIDTH = 176
"""Pixels of a keyframe, at most."""

MOST = 12
"""Keyframes of a page."""

_QUALITY = 72


@dataclass(frozen=True)
class Keyframe:
    """A frame.

    Attributes:
        time: Seconds into the clip.
        data: A data URI; empty where the clip is not there.
    """

    time: float
    data: str = ""


def keyframes(
    path: str,
    times: Sequence[float] | None = None,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
) -> list[Keyframe]:
    """Pictures of a clip.

    Args:
        path: Of the clip.
        times: Which frames, by the seconds at which they were sampled; None: up to `MOST` at even
            distances.
        num_frames, fps: As they were sampled.

    Raises:
        OSError, ValueError, ImportError: The clip cannot be read.
    """
    fps = DEFAULT_FPS if fps is None and num_frames is None else fps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with a clip was said when it was captioned
        video = read_video(path, num_frames=num_frames, fps=fps, resize=_shrink)
    found = video.timestamps
    if times is None:
        count = min(MOST, len(found))
        chosen = [(2 * i + 1) * len(found) // (2 * count) for i in range(count)]
    else:
        chosen = [int((found - time).abs().argmin()) for time in times]
    return [Keyframe(float(found[i]), as_data(video.frames[i])) for i in chosen]


def _shrink(frames: Tensor, count: int) -> Tensor:
    """A frame, uint8 `[1, H, W, 3]`, no wider than `WIDTH`."""
    height, width = frames.shape[1:3]
    if width <= WIDTH:
        return frames
    size = (WIDTH, max(1, round(height * WIDTH / width)))
    picture = Image.fromarray(frames[0].numpy()).resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture))[None]


def as_data(frame: Tensor) -> str:
    """A frame, uint8 `[H, W, 3]`, as a JPEG in a data URI."""
    file = io.BytesIO()
    Image.fromarray(frame.numpy()).save(file, "JPEG", quality=_QUALITY, optimize=True)
    return _uri("image/jpeg", file.getvalue())


def heat_map(values: Sequence[Sequence[float | None]], color: tuple[int, int, int]) -> str:
    """A table of numbers as a PNG in a data URI, a pixel for each: the larger the less clear.

    Args:
        values: Rows of numbers >= 0; None is fully clear.
        color: Of all pixels, so that it stands on any ground.
    """
    table = np.array([[0.0 if x is None else x for x in row] for row in values])
    alpha = table / max(table.max(), 1e-12)
    pixels = np.empty((*table.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = color, np.round(255 * alpha**0.7)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return _uri("image/png", file.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
