"""Which frames of a video are taken."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample_indices(
    total_frames: int,
    source_fps: float,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
    temporal_patch_size: int = 2,
) -> Tensor:
    """Chooses frames uniformly over a clip, by the rule of HuggingFace's Qwen2-VL video processor.

    Where that rule has no answer (it divides by zero, or returns an index past the end) the nearest
    one is taken: a count that would be rounded past the end is rounded down, and a clip too short
    to sample is taken whole.

    Args:
        total_frames: frames in the clip, at least 1.
        source_fps: frames per second of the clip; used with `fps` only.
        num_frames: frames wanted, at least 2, rounded to a multiple of `temporal_patch_size`. Not
            bounded by `max_frames`.
        fps: frames wanted per second of video, at least `min_frames` and at most `max_frames` in
            all. Excludes `num_frames`.
        min_frames: see `fps`.
        max_frames: see `fps`. Also the bound where neither `num_frames` nor `fps` is given and all
            frames are wanted.
        temporal_patch_size: frames that the vision encoder merges into one.

    Returns:
        int64 `[T]`, ascending, each in `[0, total_frames)`.

    Raises:
        TypeError: a count is not an int.
        ValueError: a value is out of range, or more frames are wanted than there are.
    """
    check_sampling(num_frames, fps, max_frames)
    if num_frames is not None:
        wanted = round(num_frames / temporal_patch_size) * temporal_patch_size
        if wanted > total_frames >= num_frames:
            wanted -= temporal_patch_size
        if wanted > total_frames:
            raise ValueError(
                f"num_frames={num_frames} is more than the {total_frames} frame(s) in the video: "
                "lower num_frames, or leave it out to take all frames"
            )
    elif fps is not None:
        most = min(max_frames, total_frames)
        wanted = min(max(total_frames / source_fps * fps, min_frames), most)
        wanted = math.floor(wanted / temporal_patch_size) * temporal_patch_size
    elif total_frames > max_frames:
        wanted = max_frames // temporal_patch_size * temporal_patch_size
    else:
        wanted = total_frames
    if wanted < 1:
        wanted = min(total_frames, temporal_patch_size)
    # HuggingFace's expression, for its rounding; where the division rounds down it yields one index
    # too many, past the end.
    return torch.arange(0, total_frames, total_frames / wanted).long()[:wanted]


def check_sampling(num_frames: int | None, fps: float | None, max_frames: int) -> None:
    if num_frames is not None and fps is not None:
        raise ValueError(
            f"num_frames and fps exclude each other, got num_frames={num_frames} and fps={fps}"
        )
    for name, value in (("num_frames", num_frames), ("max_frames", max_frames)):
        if value is None and name == "num_frames":
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 2:
            raise ValueError(
                f"{name} must be at least 2, got {value}: one frame is a picture, not a video"
            )
    if fps is not None and not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps must be positive and finite, got {fps}")
