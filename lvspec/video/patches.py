"""Frames to the inputs of a Qwen2-VL or Qwen2.5-VL vision tower.

HuggingFace's video processor does this where it can be imported; it needs torchvision. The same
steps are here in plain torch, with equal results: `preprocess_video`. `load_video_processor`
chooses between the two and hides the difference.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lvspec.video.config import VideoProcessorConfig
from lvspec.video.files import Resize, Video
from lvspec.video.frames import as_frames, check_frames
from lvspec.video.hf_resizing import frame_resize
from lvspec.video.resizing import resize_frames
from lvspec.video.streams import FALLBACK_FPS

if TYPE_CHECKING:
    from transformers import BaseVideoProcessor


class VideoInputs(NamedTuple):
    """What a model's forward takes for one video; `_asdict()` gives keyword arguments.

    Attributes:
        pixel_values_videos: float32 `[num_patches, 3 * temporal_patch_size * patch_size ** 2]`, or
            what another family's processor returns.
        video_grid_thw: int64 `[1, 3]`: patches in time, height and width. None for families that
            have no grid.
        second_per_grid_ts: float32 `[1]`: seconds from one step of the grid to the next.
    """

    pixel_values_videos: Tensor
    video_grid_thw: Tensor | None
    second_per_grid_ts: Tensor


@dataclass(frozen=True, eq=False)
class VideoProcessor:
    """Frames to model inputs; made by `load_video_processor`. Other processes may be given it.

    Attributes:
        backend: "hf" or "torch", whichever computes.
        temporal_patch_size: frames in one step of the grid.
    """

    backend: str
    temporal_patch_size: int
    _resize: Resize
    _patches: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]

    def resize(self, frames: Tensor, num_frames: int) -> Tensor:
        """Brings frames to the size that the model gets; what `read_video` takes as `resize`.

        Args:
            frames: uint8 `[N, H, W, 3]`, RGB: a part of the video, or all of it.
            num_frames: of the whole video; the size may depend on it.

        Returns:
            uint8 `[N, H', W', 3]`; with `process(..., resized=True)` they give what the frames as
            they were give.

        Raises:
            ValueError: a size that cannot be brought to one that is allowed.
        """
        return self._resize(frames, num_frames)

    def process(
        self,
        video: Video | Tensor | np.ndarray | Sequence[Any],
        *,
        sampled_fps: float | None = None,
        resized: bool = False,
    ) -> VideoInputs:
        """Prepares one video.

        Args:
            video: a `Video`, or its frames as uint8 `[T, H, W, 3]`, RGB, a tensor or an array, or a
                list of T frames `[H, W, 3]`.
            sampled_fps: frames per second of `video`. Left out, a `Video` knows, and bare frames
                count as 24, as they do for HuggingFace.
            resized: whether the frames went through `resize` before.

        Returns:
            `VideoInputs`, on the device of the frames.

        Raises:
            TypeError: the frames are not a uint8 tensor.
            ValueError: they have the wrong shape, or `sampled_fps` is not positive.
        """
        known_fps = isinstance(video, Video)
        frames = as_frames(video.frames if known_fps else video)
        if sampled_fps is None:
            sampled_fps = video.sampled_fps if known_fps else FALLBACK_FPS
        if not (sampled_fps > 0 and math.isfinite(sampled_fps)):
            raise ValueError(f"sampled_fps must be positive and finite, got {sampled_fps}")
        patches, grid = self._patches(frames, resized)
        seconds = torch.tensor([self.temporal_patch_size / sampled_fps], device=frames.device)
        return VideoInputs(patches, grid, seconds)


def load_video_processor(
    source: str | os.PathLike | VideoProcessorConfig, backend: str = "auto"
) -> VideoProcessor:
    """Chooses who preprocesses videos for a model.

    Args:
        source: a folder or file of a saved model, the name of a model on the HuggingFace hub, or a
            configuration.
        backend: "hf" is HuggingFace's video processor, "torch" is `preprocess_video`, "auto" is the
            first where it can be imported and the second elsewhere.

    Raises:
        ImportError: "hf" was asked for and cannot be imported.
        FileNotFoundError: no configuration in `source`.
        ValueError: an unknown `backend`, or a family that `preprocess_video` does not know.
    """
    if backend not in ("auto", "hf", "torch"):
        raise ValueError(f"backend must be 'auto', 'hf' or 'torch', got {backend!r}")
    if backend != "torch":
        obstacle = _huggingface_obstacle()
        if obstacle is None:
            return _huggingface_processor(source)
        if backend == "hf":
            raise ImportError(
                "backend='hf' needs pillow and the torchvision that matches this torch: "
                f"pip install pillow torchvision, or use backend='torch' ({obstacle})"
            ) from obstacle
    if isinstance(source, VideoProcessorConfig):
        config = source
    else:
        config = VideoProcessorConfig.from_pretrained(source)
    return VideoProcessor(
        "torch",
        config.temporal_patch_size,
        partial(resize_frames, config=config),
        partial(_prepare, config=config),
    )


def preprocess_video(frames: Tensor, config: VideoProcessorConfig) -> tuple[Tensor, Tensor]:
    """Resizes, normalises and cuts frames into patches, as HuggingFace's Qwen2-VL processor does.

    Args:
        frames: uint8 `[T, H, W, 3]`, RGB, any device.
        config: sizes and constants.

    Returns:
        `pixel_values_videos` float32 `[num_patches, 3 * temporal_patch_size * patch_size ** 2]`:
        patches in the order in which the vision tower merges them (time, then squares of
        `merge_size`, then patches within a square), each as channel, frame, row, column.
        `video_grid_thw` int64 `[1, 3]`: patches in time, height and width; their product is
        num_patches. Frames that do not fill a temporal patch are followed by copies of the last.

    Raises:
        TypeError: `frames` is not a uint8 tensor.
        ValueError: wrong shape, an aspect ratio above 200, or a size that is not allowed while
            `do_resize` is off.
    """
    check_frames(frames)
    return _cut(resize_frames(frames, len(frames), config), config)


def _prepare(frames: Tensor, resized: bool, config: VideoProcessorConfig) -> tuple[Tensor, Tensor]:
    return _cut(frames, config) if resized else preprocess_video(frames, config)


def _cut(frames: Tensor, config: VideoProcessorConfig) -> tuple[Tensor, Tensor]:
    """Frames of an allowed size, as `preprocess_video`."""
    images = frames.permute(0, 3, 1, 2).contiguous()
    return _patchify(_normalize(images, config), config)


def _normalize(images: Tensor, config: VideoProcessorConfig) -> Tensor:
    """uint8 `[T, 3, H, W]` to float32."""
    images = images.float()
    if config.do_normalize:
        # HuggingFace folds the factor into mean and deviation: this is its order of roundings.
        unit = 1.0 / config.rescale_factor if config.do_rescale else 1.0
        mean = torch.tensor(config.image_mean, device=images.device) * unit
        std = torch.tensor(config.image_std, device=images.device) * unit
        return images.sub_(mean[:, None, None]).div_(std[:, None, None])
    return images * config.rescale_factor if config.do_rescale else images


def _patchify(images: Tensor, config: VideoProcessorConfig) -> tuple[Tensor, Tensor]:
    """float32 `[T, 3, H, W]` to the patches and the grid that `preprocess_video` returns."""
    patch, merge, temporal = config.patch_size, config.merge_size, config.temporal_patch_size
    missing = -len(images) % temporal
    if missing:
        images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
    num_frames, channels, height, width = images.shape
    grid = (num_frames // temporal, height // patch, width // patch)
    patches = images.view(
        grid[0], temporal, channels, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
    )
    # Now: time, square's row and column, row and column in the square; then the inside of a patch.
    patches = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    patches = patches.reshape(math.prod(grid), channels * temporal * patch * patch)
    return patches, torch.tensor([grid], device=images.device)


def _huggingface_obstacle() -> Exception | None:
    try:
        import PIL  # noqa: F401
        import torchvision  # noqa: F401
    except Exception as error:  # a torchvision that does not match torch fails in many ways
        return error
    return None


def _huggingface_processor(source: str | os.PathLike | VideoProcessorConfig) -> VideoProcessor:
    from transformers import AutoVideoProcessor, Qwen2VLVideoProcessor

    if isinstance(source, VideoProcessorConfig):
        processor = Qwen2VLVideoProcessor(**source.to_dict())
    else:
        processor = AutoVideoProcessor.from_pretrained(source)
    if getattr(processor, "cap_pixels_per_frame", False) is None:
        # Not set means no cap, with a warning that this will change. Results here shall not.
        processor.cap_pixels_per_frame = False
    return VideoProcessor(
        "hf",
        getattr(processor, "temporal_patch_size", 1),
        frame_resize(processor),
        partial(_prepare_by, processor),
    )


def _prepare_by(
    processor: BaseVideoProcessor, frames: Tensor, resized: bool
) -> tuple[Tensor, Tensor | None]:
    inputs = processor(
        [frames.permute(0, 3, 1, 2)],
        do_sample_frames=False,
        **({"do_resize": False} if resized else {}),
        input_data_format="channels_first",
        return_tensors="pt",
    )
    return inputs["pixel_values_videos"], inputs.get("video_grid_thw")
