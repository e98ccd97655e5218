"""Video files to frames and back, through PyAV.

`read_video` decodes a file from its start, with all cores, and converts only the sampled frames to
RGB. `sample_indices` is the sampling rule of HuggingFace's Qwen2-VL video processor. `write_video`
makes small MP4 files whose colours survive. `lvspec.video.patches` turns frames into model inputs.
"""

import math
import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import torch
from torch import Tensor

# What HuggingFace assumes of a video that does not say.
FALLBACK_FPS = 24.0


@dataclass(frozen=True, eq=False)
class Video:
    """Sampled frames of one video file.

    Attributes:
        frames: uint8 `[T, H, W, 3]`, RGB, upright (rotation metadata applied).
        timestamps: float64 `[T]`, seconds after the first frame of the file, by the container.
        duration: seconds, the whole file: its number of frames over `fps`.
        fps: average frames per second of the file, before sampling.
        path: the file that was read.
    """

    frames: Tensor
    timestamps: Tensor
    duration: float
    fps: float
    path: str

    @property
    def sampled_fps(self) -> float:
        """Frames per second that are left after sampling."""
        return len(self.frames) / self.duration


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
    _check_sampling(num_frames, fps, max_frames)
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


def read_video(
    path: str | os.PathLike,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int = 768,
    temporal_patch_size: int = 2,
) -> Video:
    """Reads frames sampled uniformly from a video file.

    Frames are counted and sampled by index, as HuggingFace does, also where the frame rate varies;
    `timestamps` are the true ones. A damaged file gives the frames that can be decoded, sampled
    over those, and a warning.

    Args:
        path: a local file in any container that FFmpeg reads.
        num_frames: frames wanted, at least 2 and at most what the file has; see `sample_indices`.
        fps: frames wanted per second of video. Excludes `num_frames`.
        max_frames: bound for `fps`, and for a call with neither, which takes all frames up to it.
        temporal_patch_size: counts are rounded to a multiple of it; 2 for Qwen, 1 for models that
            merge no frames.

    Returns:
        A `Video`.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: `path` is a directory.
        TypeError: `num_frames` or `max_frames` is not an int.
        ValueError: not a video, no frame in it, or a request that cannot be met.

    Example:
        >>> video = read_video("cat.mp4", fps=2.0)
        >>> video.frames.shape
        torch.Size([20, 720, 1280, 3])
    """
    _check_sampling(num_frames, fps, max_frames)
    path = os.fspath(path)
    _check_file(path)
    choose = partial(
        sample_indices,
        num_frames=num_frames,
        fps=fps,
        max_frames=max_frames,
        temporal_patch_size=temporal_patch_size,
    )

    total_frames, declared_frames, source_fps = _count_frames(path)
    indices = choose(total_frames, source_fps)
    decoded = _decode(path, indices, source_fps)
    if decoded.frames is None or len(decoded.frames) < len(indices):
        # Packets are not always frames: hidden reference frames, single fields, damage. Now the
        # true number is known.
        if decoded.num_decoded == 0:
            raise ValueError(f"no frame of the video could be decoded: {path}")
        total_frames = decoded.num_decoded
        indices = choose(total_frames, source_fps)
        decoded = _decode(path, indices, source_fps)
        if decoded.frames is None or len(decoded.frames) < len(indices):
            raise ValueError(f"the video is damaged and does not decode the same way twice: {path}")
    if decoded.num_errors or declared_frames > total_frames:
        warnings.warn(
            f"the video is truncated or damaged; took {len(indices)} of the {total_frames} "
            f"frame(s) that can be read: {path}",
            stacklevel=2,
        )
    return Video(decoded.frames, decoded.timestamps, total_frames / source_fps, source_fps, path)


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


@dataclass(frozen=True, eq=False)
class _Decoded:
    """What one pass over a file gave; `frames` is None if no wanted frame came."""

    frames: Tensor | None
    timestamps: Tensor
    num_decoded: int
    num_errors: int


@contextmanager
def _open_video(path: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    try:
        # Playlists and the like may name other places: a local file is all that is ever opened.
        container = av.open(path, options={"protocol_whitelist": "file"})
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise ValueError(f"not a video, or not one that FFmpeg can read: {path}") from error
    with container:
        # FFmpeg draws plain text files as pictures of a terminal.
        if container.format.name == "tty":
            raise ValueError(f"not a video but a text file: {path}")
        # A cover picture inside an audio file is a video stream to FFmpeg, but no video.
        picture = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams if not stream.disposition & picture]
        kinds = ", ".join(sorted({stream.type for stream in streams})) or "nothing"
        streams = [stream for stream in streams if stream.type == "video"]
        if not streams:
            raise ValueError(f"no video stream in the file, which holds {kinds}: {path}")
        stream = streams[0]
        if stream.codec_context is None:
            raise ValueError(f"this build of FFmpeg has no decoder for the video stream: {path}")
        stream.thread_type = "AUTO"
        yield container, stream


def _count_frames(path: str) -> tuple[int, int, float]:
    """Counts packets, which takes no decoding: the container's own count may be absent or wrong.

    Returns the number of frames to be expected, the number that the container promises less those
    that its edit list hides (0 if it does not say), and frames per second.
    """
    num_shown = num_hidden = 0
    with _open_video(path) as (container, stream):
        source_fps = float(stream.average_rate or stream.guessed_rate or FALLBACK_FPS)
        declared = stream.frames
        try:
            for packet in container.demux(stream):
                if packet.size:
                    num_hidden += packet.is_discard
                    num_shown += not packet.is_discard
        except av.FFmpegError:
            # The end of what can be read; decoding meets the same error and reports it.
            pass
    if num_shown == 0:
        raise ValueError(f"the video has no frames: {path}")
    return num_shown, max(declared - num_hidden, 0), source_fps


def _decode(path: str, indices: Tensor, source_fps: float) -> _Decoded:
    """Decodes from the start to the last of `indices` (int64, ascending) and keeps those frames."""
    wanted = indices.tolist()
    frames, seconds, start = None, [], None
    num_decoded = num_errors = 0
    with _open_video(path) as (container, stream):
        packets = container.demux(stream)
        while len(seconds) < len(wanted):
            try:
                packet = next(packets)
            except StopIteration:
                break
            except av.FFmpegError:
                num_errors += 1
                break
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                num_errors += 1
                continue
            for frame in decoded:
                time = frame.time if frame.time is not None else num_decoded / source_fps
                start = time if start is None else start
                if len(seconds) < len(wanted) and num_decoded == wanted[len(seconds)]:
                    pixels = _to_rgb(frame, None if frames is None else frames.shape[1:3])
                    if frames is None:
                        frames = pixels.new_empty(len(wanted), *pixels.shape)
                    frames[len(seconds)] = pixels
                    seconds.append(time - start)
                num_decoded += 1
    if frames is not None:
        frames = frames[: len(seconds)]
    return _Decoded(frames, torch.tensor(seconds, dtype=torch.float64), num_decoded, num_errors)


def _to_rgb(frame: av.VideoFrame, upright_size: tuple[int, int] | None) -> Tensor:
    """Converts a decoded frame to uint8 `[H, W, 3]`, upright, scaled to `upright_size` if given.

    The size is that of the first frame: some streams change theirs midway.
    """
    quarter_turns = round(frame.rotation / 90) % 4
    size = {}
    if upright_size is not None:
        height, width = upright_size if quarter_turns % 2 == 0 else reversed(upright_size)
        size = {"width": width, "height": height}
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24", **size))
    return torch.rot90(pixels, quarter_turns, dims=(0, 1))


def _check_file(path: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {path}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"path must be a video file, got a folder: {path}")
    # A pipe would block for ever.
    if not os.path.isfile(path):
        raise ValueError(f"path must be a regular file: {path}")


def _check_sampling(num_frames: int | None, fps: float | None, max_frames: int) -> None:
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


def check_frames(frames: Tensor) -> None:
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8:
        got = str(frames.dtype) if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"frames must be a uint8 tensor, got {got}")
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"frames must be [T, H, W, 3] with T, H, W of at least 1, got {list(frames.shape)}"
        )
