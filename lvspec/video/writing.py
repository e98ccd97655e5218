"""Frames to a small video file whose colours survive."""

from __future__ import annotations

import math
import os
import uuid
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from lvspec.video.frames import check_frames
from lvspec.video.streams import import_av


def write_video(
    path: str | os.PathLike,
    frames: Tensor,
    *,
    fps: float = 8.0,
    pixel_format: str = "yuv444p",
    quality: int = 8,
) -> None:
    """Writes frames as an MP4 file (H.264 where PyAV has libx264, else MPEG-4 part 2).

    The file appears under its name only when it is complete, and replaces what was there.

    Args:
        path: where to write; its folder must exist.
        frames: uint8 `[T, H, W, 3]`, RGB, at least one frame.
        fps: frames per second.
        pixel_format: "yuv444p" keeps the colour of every pixel; "yuv420p" shares colour among 2x2
            pixels (even sizes only) and plays in every browser. MPEG-4 part 2 has "yuv420p" only.
        quality: quantiser, 0 (lossless but for the colour conversion) to 51 (worst).

    Raises:
        TypeError: `frames` is not a uint8 tensor.
        ValueError: wrong shape, `fps` not positive, unknown pixel format or a size it cannot hold.
        FileNotFoundError: the folder does not exist.
    """
    av = import_av()
    target = Path(path)
    check_frames(frames)
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps must be positive and finite, got {fps}")
    if pixel_format not in ("yuv444p", "yuv420p"):
        raise ValueError(f"pixel_format must be 'yuv444p' or 'yuv420p', got {pixel_format!r}")
    if not 0 <= quality <= 51:
        raise ValueError(f"quality must be between 0 and 51, got {quality}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {target.parent}")
    codec, options = "libx264", {"crf": str(quality), "preset": "veryfast"}
    if codec not in av.codecs_available:
        codec, options, pixel_format = "mpeg4", {"qscale": str(max(1, quality // 2))}, "yuv420p"
    _, height, width, _ = frames.shape
    if pixel_format == "yuv420p" and (height % 2 or width % 2):
        raise ValueError(
            f"pixel_format 'yuv420p' needs an even height and width, got {height}x{width}"
        )

    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        # The index goes to the front, so that a file cut short can still be read up to the cut.
        with av.open(
            str(partial), "w", format="mp4", options={"movflags": "+faststart"}
        ) as container:
            stream = container.add_stream(
                codec, rate=Fraction(fps).limit_denominator(1001), options=options
            )
            stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
            for pixels in frames.cpu().contiguous().numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
