"""A file to the stream that is meant, and what that stream promises, through PyAV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av

# What HuggingFace assumes of a video that does not say.
FALLBACK_FPS = 24.0

# Of containers of the MP4 kind that hold one picture; sequences have other brands.
PICTURE_BRANDS = ("avif", "heic", "heix", "mif1")


def import_av() -> ModuleType:
    """PyAV, which nothing but video files needs.

    Raises:
        ImportError: It is not installed; says how to install it.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "av: expected PyAV, which reads and writes video files (pip install av), got "
            f"{type(error).__name__}: {error}"
        ) from error
    return av


def check_file(path: str) -> None:
    """Refuse what cannot be a video file, as far as that shows without opening it.

    Raises:
        FileNotFoundError, IsADirectoryError, ValueError: Names the path.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {path}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"path must be a video file, got a folder: {path}")
    # A pipe would block for ever.
    if not os.path.isfile(path):
        raise ValueError(f"path must be a regular file: {path}")


@contextmanager
def open_video(path: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and the stream in it that FFmpeg calls the best, with all cores to decode it.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: Not a video, or none that can be decoded.
    """
    av = import_av()
    try:
        # An absolute path: FFmpeg takes "12:30.mp4" for a protocol. Playlists and the like may name
        # other places: a local file is all that is ever opened.
        container = av.open(os.path.abspath(path), options={"protocol_whitelist": "file"})
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise ValueError(f"not a video, or not one that FFmpeg can read: {path}") from error
    with container:
        # FFmpeg draws plain text files as pictures of a terminal.
        if container.format.name == "tty":
            raise ValueError(f"not a video but a text file: {path}")
        _refuse_pictures(container, path)
        stream = _best_stream(container, path)
        if stream.codec_context is None:
            raise ValueError(f"this build of FFmpeg has no decoder for the video stream: {path}")
        stream.thread_type = "AUTO"
        yield container, stream


def _refuse_pictures(container: av.container.InputContainer, path: str) -> None:
    name = container.format.name
    brand = container.metadata.get("major_brand", "").strip()
    if name != "image2" and not name.endswith("_pipe") and brand not in PICTURE_BRANDS:
        return
    with open(path, "rb") as file:
        start = file.read(21)
    if start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X" and start[20] & 2:
        raise ValueError(
            "expected a video that FFmpeg can decode, got an animated WebP, for which this build "
            f"of FFmpeg has no decoder: convert it to MP4 first: {path}"
        )
    contexts = [stream.codec_context for stream in container.streams.video]
    codec = next((context.name for context in contexts if context is not None), brand or name)
    raise ValueError(
        f"expected a video, got a picture ({codec}); lvspec.generate takes what HF's AutoProcessor "
        f"of the checkpoint makes of pictures, video files alone are read here: {path}"
    )


def _best_stream(container: av.container.InputContainer, path: str) -> av.VideoStream:
    from av.stream import Disposition

    # A cover picture inside an audio file is a video stream to FFmpeg, but no video.
    shown = [s for s in container.streams if not s.disposition & Disposition.attached_pic]
    videos = {stream.index: stream for stream in shown if stream.type == "video"}
    if not videos:
        kinds = ", ".join(sorted({stream.type for stream in shown})) or "nothing"
        raise ValueError(f"no video stream in the file, which holds {kinds}: {path}")
    best = container.streams.best("video")
    # FFmpeg may like a cover best, if it alone is marked as the default.
    return videos.get(best.index) or next(iter(videos.values()))


@dataclass(frozen=True)
class Promise:
    """What a stream says of itself, and what of that is in the file.

    Attributes:
        num_packets: Those with a frame to be shown; mostly one frame each.
        num_missing: Frames that the container promises and the file has no packet for.
        fps: Frames per second.
    """

    num_packets: int
    num_missing: int
    fps: float


def read_promise(path: str) -> Promise:
    """Count packets, which takes no decoding: the container's own count may be absent or wrong.

    Raises:
        ImportError, ValueError: As `open_video`; or there is no packet.
    """
    av = import_av()
    num_shown = num_hidden = 0
    end = 0.0
    with open_video(path) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or FALLBACK_FPS)
        seconds = _promised_seconds(container, stream)
        # The whole file's duration may be another stream's.
        watched = [stream] if container.format.name == "avi" or not seconds else []
        try:
            for packet in container.demux(*watched):
                time = packet.dts if packet.pts is None else packet.pts
                if time is not None:
                    end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
                if packet.size and packet.stream.index == stream.index:
                    num_hidden += packet.is_discard
                    num_shown += not packet.is_discard
        except av.FFmpegError:
            # The end of what can be read; decoding meets the same error and reports it.
            pass
        if seconds:
            # Durations are rounded, and the last frame of some files is said to stay for a while.
            short = seconds - end > max(3 / fps, 0.1 * seconds)
            num_missing = round((seconds - end) * fps) if short else 0
        else:
            num_missing = max(stream.frames - num_hidden - num_shown, 0)
    if num_shown == 0:
        raise ValueError(f"the video has no frames: {path}")
    return Promise(num_shown, num_missing, fps)


def _promised_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Where frames end by a header; 0 where the header counts frames, or FFmpeg guesses only."""
    name = container.format.name
    if name == "avi":  # its count has moments in it at which nothing new is shown
        return float(stream.frames * stream.time_base)
    if name.startswith("matroska") and container.duration:
        return container.duration / 1e6
    return 0.0
