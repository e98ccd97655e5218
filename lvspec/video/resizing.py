"""The size of the frames that a model gets, by the rule of HuggingFace's Qwen2-VL processor."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lvspec.video.config import VideoProcessorConfig


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Rounds a size to multiples of `factor` with an area within the limits, in pixels.

    Returns:
        Height and width, of about the same ratio as before.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"one side may be 200 times the other at most, got {height}x{width}")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        enlarge = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * enlarge / factor) * factor
        new_width = math.ceil(width * enlarge / factor) * factor
    return new_height, new_width


def resize_frames(frames: Tensor, num_frames: int, config: VideoProcessorConfig) -> Tensor:
    """Frames to the size that the model gets: sides of whole merge squares.

    Every frame is resized for itself, so that any part of a video may be given at a time.

    Args:
        frames: uint8 `[N, H, W, 3]`.
        num_frames: Of the whole video; the size may depend on it.
        config: The rule.

    Returns:
        uint8 `[N, H', W', 3]`.

    Raises:
        ValueError: An aspect ratio above 200, or a size that is not allowed while `do_resize` is
            off.
    """
    _, height, width, _ = frames.shape
    factor = config.patch_size * config.merge_size
    if not config.do_resize:
        if height % factor or width % factor:
            raise ValueError(
                "with do_resize=False, height and width must be multiples of patch_size * "
                f"merge_size = {factor}, got {height}x{width}"
            )
        return frames
    max_pixels = config.max_pixels
    if config.cap_pixels_per_frame:
        budget = int(config.max_video_tokens * factor * factor * 0.9)
        share = budget * config.temporal_patch_size // num_frames
        max_pixels = max(min(max_pixels, share), int(config.min_pixels * 1.05))
    size = smart_resize(
        height, width, factor=factor, min_pixels=config.min_pixels, max_pixels=max_pixels
    )
    if size == (height, width):
        return frames
    images = frames.permute(0, 3, 1, 2).contiguous()
    # As torchvision does, so that roundings agree: CPUs work on bytes (for bilinear weights, those
    # with AVX), other devices go through float32.
    in_bytes = images.device.type == "cpu" and (
        config.resample == "bicubic"
        or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    )
    resized = functional.interpolate(
        images if in_bytes else images.float(),
        size=size,
        mode=config.resample,
        align_corners=False,
        antialias=True,
    )
    resized = resized if in_bytes else resized.clamp_(0, 255).round_().to(torch.uint8)
    return resized.permute(0, 2, 3, 1)
