"""Frames in memory: what they must be, and what is taken for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_frames(frames: Tensor | np.ndarray | Sequence[Any]) -> Tensor:
    """Frames as one tensor; nothing is copied where that can be.

    Args:
        frames: uint8 `[T, H, W, 3]`, RGB, as a tensor or an array, or a list of T frames
            `[H, W, 3]`: tensors, arrays or PIL images.

    Returns:
        uint8 `[T, H, W, 3]`.

    Raises:
        TypeError: Not of numbers, or not uint8.
        ValueError: Wrong shape, or frames of several sizes.
    """
    if isinstance(frames, (list, tuple)):
        frames = _stack(frames)
    elif isinstance(frames, np.ndarray):
        frames = _from_numpy(frames)
    check_frames(frames)
    return frames


def check_frames(frames: Tensor) -> None:
    """Refuse what is not uint8 `[T, H, W, 3]` with at least one of each.

    Raises:
        TypeError: Not a uint8 tensor.
        ValueError: Wrong shape.
    """
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8:
        got = str(frames.dtype) if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"frames must be a uint8 tensor, got {got}")
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"frames must be [T, H, W, 3] with T, H, W of at least 1, got {list(frames.shape)}"
        )


def _stack(frames: Sequence[Any]) -> Tensor:
    tensors = [
        frame if isinstance(frame, Tensor) else _from_numpy(np.asarray(frame)) for frame in frames
    ]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) != 1:
        got = ", ".join(map(str, sorted(shapes))) or "none"
        raise ValueError(f"frames: expected frames [H, W, 3] of one size, got {got}")
    return torch.stack(tensors)


def _from_numpy(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "buif":
        raise TypeError(f"frames: expected numbers, got an array of {array.dtype}")
    # torch takes neither negative strides, as of BGR turned round, nor memory that is read-only.
    return torch.from_numpy(np.require(array, requirements=("C", "W")))
