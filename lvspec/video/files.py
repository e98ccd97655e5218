"""Video files to sampled frames, through PyAV.

`read_video` decodes a file from its start, with all cores, and converts only the sampled frames to
RGB. `lvspec.video.patches` turns frames into model inputs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvspec.video.orientation import Orientation, orientation_after
from lvspec.video.sampling import check_sampling, sample_indices
from lvspec.video.streams import Promise, check_file, import_av, open_video, read_promise

if TYPE_CHECKING:
    import av

# uint8 frames [N, H, W, 3] and the number of frames of the whole video to uint8 [N, H', W', 3].
Resize = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Video:
    """Sampled frames of one video file.

    Attributes:
        frames: uint8 `[T, H, W, 3]`, RGB, upright (orientation metadata applied).
        timestamps: float64 `[T]`, seconds after the first frame of the file, by the container.
        duration: seconds, the whole file: its number of frames over `fps`.
        fps: average frames per second of the file, before sampling.
        path: the file that was read; empty for frames that are of no file.
        source_size: height and width of the upright frames in the file, where `frames` may have
            been resized. None: as `frames`.
    """

    frames: Tensor
    timestamps: Tensor
    duration: float
    fps: float
    path: str
    source_size: tuple[int, int] | None = None

    @property
    def sampled_fps(self) -> float:
        """Frames per second that are left after sampling."""
        return len(self.frames) / self.duration


def read_video(
    path: str | os.PathLike,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int = 768,
    temporal_patch_size: int = 2,
    resize: Resize | None = None,
) -> Video:
    """Reads frames sampled uniformly from a video file.

    Frames are counted and sampled by index, as HuggingFace does, also where the frame rate varies;
    `timestamps` are the true ones. Of several video streams the one that FFmpeg calls the best is
    read. Pixels are taken for square whatever the file says of their aspect ratio, as HuggingFace's
    readers do. A damaged file gives the frames that can be decoded, sampled over those, and one
    warning with the number that is lost: missing, not decodable, or patched up by the decoder. A
    cut that leaves no trace (in MPEG-TS, for instance, or in a fragmented MP4) goes unnoticed.

    Args:
        path: a local file in any container that FFmpeg reads. Pictures are refused.
        num_frames: frames wanted, at least 2 and at most what the file has; see `sample_indices`.
        fps: frames wanted per second of video. Excludes `num_frames`.
        max_frames: bound for `fps`, and for a call with neither, which takes all frames up to it.
        temporal_patch_size: counts are rounded to a multiple of it; 2 for Qwen, 1 for models that
            merge no frames.
        resize: called with each frame as soon as it is decoded, uint8 `[1, H, W, 3]`, and with the
            number of frames of the video, so that no more than one is kept at full size; returns
            uint8 `[1, H', W', 3]`, one size for all. None: frames stay as they are.

    Returns:
        A `Video`.

    Raises:
        FileNotFoundError: no such file.
        ImportError: PyAV is not installed.
        IsADirectoryError: `path` is a directory.
        TypeError: `num_frames` or `max_frames` is not an int.
        ValueError: not a video, no frame in it, or a request that cannot be met.

    Example:
        >>> video = read_video("cat.mp4", fps=2.0)
        >>> video.frames.shape
        torch.Size([20, 720, 1280, 3])
    """
    check_sampling(num_frames, fps, max_frames)
    path = os.fsdecode(path)
    check_file(path)
    choose = partial(
        sample_indices,
        num_frames=num_frames,
        fps=fps,
        max_frames=max_frames,
        temporal_patch_size=temporal_patch_size,
    )

    promise = read_promise(path)
    total_frames = promise.num_packets
    indices = choose(total_frames, promise.fps)
    decoded = _decode(path, indices, promise.fps, resize)
    num_lost = decoded.num_lost(promise)
    if decoded.frames is None or len(decoded.frames) < len(indices):
        # Packets are not always frames: hidden reference frames, single fields, pictures that are
        # not coded, damage. Now the true number is known.
        if decoded.num_decoded == 0:
            raise ValueError(f"no frame of the video could be decoded: {path}")
        total_frames = decoded.num_decoded
        indices = choose(total_frames, promise.fps)
        decoded = _decode(path, indices, promise.fps, resize)
        if decoded.frames is None or len(decoded.frames) < len(indices):
            raise ValueError(f"the video is damaged and does not decode the same way twice: {path}")
    if num_lost:
        warnings.warn(
            f"the video is truncated or damaged: {num_lost} frame(s) are lost; took {len(indices)} "
            f"of the {total_frames} frame(s) that can be read: {path}",
            stacklevel=2,
        )
    return Video(
        decoded.frames,
        decoded.timestamps,
        total_frames / promise.fps,
        promise.fps,
        path,
        decoded.source_size,
    )


@dataclass(frozen=True, eq=False)
class _Decoded:
    """What one pass over a file gave; `frames` is None if no wanted frame came.

    Attributes:
        num_broken: Frames that the decoder patched up.
        num_errors: Packets that it could not read.
        ended: Whether it went through the whole file.
    """

    frames: Tensor | None
    timestamps: Tensor
    source_size: tuple[int, int] | None
    num_decoded: int
    num_broken: int
    num_errors: int
    ended: bool

    def num_lost(self, promise: Promise) -> int:
        """Frames that are missing or broken, as far as the file was decoded."""
        undecoded = self.num_errors
        if self.ended and (self.num_errors or self.num_broken or promise.num_missing):
            undecoded = max(undecoded, promise.num_packets - self.num_decoded)
        return promise.num_missing + self.num_broken + undecoded


def _decode(path: str, indices: Tensor, source_fps: float, resize: Resize | None) -> _Decoded:
    """Decodes from the start to the last of `indices` (int64, ascending) and keeps those frames."""
    av = import_av()
    wanted = indices.tolist()
    frames, seconds, start, size = None, [], None, None
    num_decoded = num_broken = num_errors = 0
    ended, orientation = False, Orientation()
    with open_video(path) as (container, stream):
        packets = container.demux(stream)
        while len(seconds) < len(wanted):
            try:
                packet = next(packets)
            except StopIteration:
                ended = True
                break
            except av.FFmpegError:
                num_errors += 1
                ended = True
                break
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                num_errors += 1
                continue
            for frame in decoded:
                time = frame.time if frame.time is not None else num_decoded / source_fps
                start = time if start is None else start
                orientation = orientation_after(frame, orientation)
                num_broken += frame.is_corrupt
                if len(seconds) < len(wanted) and num_decoded == wanted[len(seconds)]:
                    pixels = _to_rgb(frame, orientation, size)
                    size = tuple(pixels.shape[:2])
                    if resize is not None:
                        pixels = resize(pixels[None], len(wanted))[0]
                    if frames is None:
                        frames = pixels.new_empty(len(wanted), *pixels.shape)
                    frames[len(seconds)] = pixels
                    seconds.append(time - start)
                num_decoded += 1
    if frames is not None:
        frames = frames[: len(seconds)]
    timestamps = torch.tensor(seconds, dtype=torch.float64)
    return _Decoded(frames, timestamps, size, num_decoded, num_broken, num_errors, ended)


def _to_rgb(
    frame: av.VideoFrame, orientation: Orientation, upright_size: tuple[int, int] | None
) -> Tensor:
    """Converts a decoded frame to uint8 `[H, W, 3]`, upright, scaled to `upright_size` if given.

    The size is that of the first frame: some streams change theirs midway.
    """
    size = {}
    if upright_size is not None:
        height, width = reversed(upright_size) if orientation.transposed else upright_size
        size = {"width": width, "height": height}
    return orientation.apply(torch.from_numpy(frame.to_ndarray(format="rgb24", **size)))
