"""Reading and writing video files; every file is made here."""

import contextlib
import os
import re
import struct
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

from lvspec.video import read_video, sample_indices, write_video, writing

av = pytest.importorskip("av")

SHADES = [16 * index + 8 for index in range(12)]


def shade_clip(shades, height=32, width=48):
    """Flat grey frames: the shade tells which frame it is."""
    return torch.tensor(shades, dtype=torch.uint8)[:, None, None, None].expand(-1, height, width, 3)


def shades_of(frames):
    """The position in SHADES of each frame."""
    return [round((value - 8) / 16) for value in frames.float().mean(dim=(1, 2, 3)).tolist()]


def shape_clip(height=84, width=84):
    """A red square moves right and a yellow one down, half a patch a frame, before blue."""
    frames = torch.tensor([40, 60, 200], dtype=torch.uint8).expand(8, height, width, 3).clone()
    for time in range(8):
        frames[time, 7:28, 7 * time : 7 * time + 21] = torch.tensor([220, 40, 40]).byte()
        frames[time, 7 * time : 7 * time + 21, 60:81] = torch.tensor([240, 210, 50]).byte()
    return frames


def encode(path, frames, *, times=None, rotation=0, container_format=None):
    """Writes a file with PyAV alone, for what `write_video` does not do; `times` in 1/100 s."""
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream("mpeg4", rate=10, options={"qscale": "2"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 100)
        if rotation:
            stream.set_display_rotation(rotation)
        for index, pixels in enumerate(frames.contiguous().numpy()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@contextlib.contextmanager
def same_scheduling():
    """SVT-AV1 gives root's whole process real-time priority, and the machine to its tests alone."""
    if not hasattr(os, "sched_setscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def encode_pictures(path, frames, codec, container_format, pixel_format):
    """Writes frames [T, H, W, 3] in a format for pictures or animations."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV is without {codec}")
    with same_scheduling(), av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        for pixels in frames.contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def encode_h264(path, frames, display_orientation=""):
    """Raw H.264 of one group of pictures, with an orientation inside the stream."""
    if "libx264" not in av.codecs_available:
        pytest.skip("this PyAV is without libx264")
    plain = path.with_suffix(".plain.h264")
    with av.open(str(plain), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames.contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    settings = f"=display_orientation=insert:{display_orientation}" if display_orientation else ""
    with av.open(str(plain)) as source:
        stream = source.streams.video[0]
        context = av.bitstream.BitStreamFilterContext(f"h264_metadata{settings}", stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        packets = [filtered for packet in packets for filtered in context.filter(packet)]
        path.write_bytes(b"".join(bytes(packet) for packet in packets + context.filter(None)))


def quadrants(frame):
    """Mean brightness of the four quarters of `[H, W, 3]`, as `[2, 2]`."""
    height, width = frame.shape[0] // 2, frame.shape[1] // 2
    return frame.float().reshape(2, height, 2, width, 3).mean(dim=(1, 3, 4))


def encode_audio(path, *, cover=None):
    """A second of silence, with `cover`, a uint8 picture `[H, W, 3]`, as the cover art."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        if cover is not None:
            picture = container.add_stream("png")
            picture.height, picture.width, _ = cover.shape
            picture.pix_fmt = "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic.value
        silence = np.zeros((1, 1024), dtype=np.float32)
        for index in range(4):
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if cover is not None:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
            container.mux(picture.encode())


@pytest.fixture
def shades_file(tmp_path):
    path = tmp_path / "shades.mp4"
    write_video(path, shade_clip(SHADES), fps=10)
    return path


@pytest.mark.parametrize(
    ("total_frames", "request_", "expected"),
    [
        (10, {"num_frames": 4}, [0, 2, 5, 7]),
        (10, {"num_frames": 3}, [0, 2, 5, 7]),
        (10, {"num_frames": 5}, [0, 2, 5, 7]),
        (3, {"num_frames": 3}, [0, 1]),
        (2, {"num_frames": 2}, [0, 1]),
        (4, {"num_frames": 5}, [0, 1, 2, 3]),
        (5, {"num_frames": 3, "temporal_patch_size": 1}, [0, 1, 3]),
        (8, {}, [0, 1, 2, 3, 4, 5, 6, 7]),
        (9, {}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (9, {"max_frames": 5}, [0, 2, 4, 6]),
        (1, {}, [0]),
        (40, {"fps": 2.0}, [0, 5, 10, 15, 20, 25, 30, 35]),
        (40, {"fps": 0.1}, [0, 10, 20, 30]),
        (40, {"fps": 2.0, "max_frames": 5}, [0, 10, 20, 30]),
        (3, {"fps": 2.0}, [0, 1]),
        (1, {"fps": 2.0}, [0]),
        (6, {"fps": 1000.0}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_sample_indices_literals(total_frames, request_, expected):
    indices = sample_indices(total_frames, 10.0, **request_)
    assert indices.dtype == torch.int64
    assert indices.tolist() == expected


def test_sample_indices_never_leave_the_clip():
    # 2999 frames by 740 is a case where floating-point division yields one index too many.
    for total_frames in [2999, *range(1, 60)]:
        for num_frames in (740, *range(2, 60)):
            if num_frames <= total_frames:
                indices = sample_indices(total_frames, 25.0, num_frames=num_frames)
                assert abs(len(indices) - num_frames) <= 1
                assert 0 <= indices.min() and indices.max() < total_frames
                assert (indices.diff() > 0).all()


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"num_frames": 0}, ValueError, "num_frames must be at least 2, got 0"),
        ({"num_frames": 1}, ValueError, "num_frames must be at least 2, got 1"),
        ({"num_frames": -4}, ValueError, "num_frames must be at least 2, got -4"),
        ({"num_frames": 4.0}, TypeError, "num_frames must be an int, got float"),
        ({"num_frames": True}, TypeError, "num_frames must be an int, got bool"),
        ({"num_frames": 14}, ValueError, r"num_frames=14 is more than the 12 frame"),
        ({"num_frames": 4, "fps": 1.0}, ValueError, "num_frames and fps exclude each other"),
        ({"fps": 0.0}, ValueError, "fps must be positive and finite, got 0.0"),
        ({"fps": -1.0}, ValueError, "fps must be positive"),
        ({"fps": float("nan")}, ValueError, "fps must be positive"),
        ({"max_frames": 1}, ValueError, "max_frames must be at least 2, got 1"),
    ],
)
def test_requests_that_cannot_be_met(shades_file, request_, error, message):
    with pytest.raises(error, match=message):
        read_video(shades_file, **request_)


def test_every_frame_by_default(shades_file):
    video = read_video(shades_file)
    assert video.frames.shape == (12, 32, 48, 3) and video.frames.dtype == torch.uint8
    assert shades_of(video.frames) == list(range(12))
    assert video.timestamps.dtype == torch.float64
    torch.testing.assert_close(video.timestamps, torch.arange(12, dtype=torch.float64) / 10)
    assert video.duration == pytest.approx(1.2) and video.fps == 10.0
    assert video.sampled_fps == pytest.approx(10.0)
    assert video.path == str(shades_file)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"num_frames": 4}, [0, 3, 6, 9]),
        ({"num_frames": 2}, [0, 6]),
        ({"fps": 5.0}, [0, 2, 4, 6, 8, 10]),
        ({"max_frames": 6}, [0, 2, 4, 6, 8, 10]),
    ],
)
def test_sampled_frames_are_the_right_ones(shades_file, request_, expected):
    video = read_video(str(shades_file), **request_)
    assert shades_of(video.frames) == expected
    assert video.timestamps.tolist() == pytest.approx([index / 10 for index in expected])
    assert video.duration == pytest.approx(1.2)
    assert video.sampled_fps == pytest.approx(len(expected) / 1.2)


@pytest.mark.parametrize("suffix", [".ts", ".mkv", ".avi", ".m4v"])
def test_containers_with_and_without_a_frame_count(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    encode(path, shade_clip(SHADES), container_format="m4v" if suffix == ".m4v" else None)
    assert shades_of(read_video(path).frames) == list(range(12))
    assert shades_of(read_video(path, num_frames=4).frames) == [0, 3, 6, 9]


def test_variable_frame_rate_keeps_true_times(tmp_path):
    times = [0, 10, 15, 20, 70, 80, 81, 90, 140, 150, 160, 200]
    encode(tmp_path / "clip.mkv", shade_clip(SHADES), times=times)
    video = read_video(tmp_path / "clip.mkv", num_frames=4)
    assert shades_of(video.frames) == [0, 3, 6, 9]
    assert video.timestamps.tolist() == pytest.approx([0.0, 0.2, 0.81, 1.5], abs=0.002)


def test_times_start_at_the_first_frame(tmp_path):
    encode(tmp_path / "clip.mkv", shade_clip(SHADES[:4]), times=[500, 510, 520, 530])
    assert read_video(tmp_path / "clip.mkv").timestamps.tolist() == pytest.approx(
        [0.0, 0.1, 0.2, 0.3], abs=0.002
    )


@pytest.mark.skipif(
    not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV writes no rotation"
)
@pytest.mark.parametrize(
    ("rotation", "corner"), [(0, (0, 0)), (90, (1, 0)), (180, (1, 1)), (-90, (0, 1))]
)
def test_rotation_is_applied(tmp_path, rotation, corner):
    frames = torch.zeros(3, 32, 64, 3, dtype=torch.uint8)
    frames[:, :16, :32] = 255
    encode(tmp_path / "clip.mp4", frames, rotation=rotation)
    upright = read_video(tmp_path / "clip.mp4").frames
    assert upright.shape[1:3] == ((64, 32) if rotation in (90, -90) else (32, 64))
    bright = quadrants(upright[0])
    assert divmod(bright.argmax().item(), 2) == corner
    assert bright.flatten().sort().values[:3].max() < 20 < 230 < bright.max()


@pytest.mark.parametrize("a, b, c, d", [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_display_matrix(tmp_path, a, b, c, d, transposed):
    """QuickTime: a pixel in column x and row y is shown at a x + c y and b x + d y."""
    if transposed:
        a, b, c, d = b, a, d, c
    frames = torch.zeros(2, 32, 64, 3, dtype=torch.uint8)
    frames[:, :16, :32] = 250  # top left
    frames[:, :16, 32:] = 120  # top right
    encode(tmp_path / "clip.mp4", frames)
    content = bytearray((tmp_path / "clip.mp4").read_bytes())
    at = content.index(b"tkhd") + 44  # after the header, six numbers and four short ones
    assert content[at : at + 36] == struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    matrix = [65536 * number for number in (a, b, 0, c, d, 0, 0, 0)]
    content[at : at + 36] = struct.pack(">9i", *matrix, 1 << 30)
    (tmp_path / "clip.mp4").write_bytes(content)
    expected = torch.zeros(2, 2)
    for x, y, shade in ((-1, -1, 250), (1, -1, 120)):
        column, row = a * x + c * y, b * x + d * y
        expected[(row + 1) // 2, (column + 1) // 2] = shade
    shown = read_video(tmp_path / "clip.mp4").frames
    assert shown.shape == ((2, 64, 32, 3) if transposed else (2, 32, 64, 3))
    for frame in shown:
        assert (quadrants(frame) - expected).abs().max() < 8


@pytest.mark.parametrize(
    "first, second, corners",
    [
        ("rotate=90", "", [(1, 0), (0, 0)]),
        ("", "rotate=90", [(0, 0), (1, 0)]),
        ("rotate=180", "flip=horizontal", [(1, 1), (0, 1)]),
        ("rotate=90:flip=vertical", "rotate=270", [(1, 1), (0, 1)]),
    ],
)
def test_an_orientation_inside_the_stream_holds_until_it_changes(tmp_path, first, second, corners):
    """On the first frame of each group only, as encoders write it."""
    frames = torch.zeros(5, 64, 64, 3, dtype=torch.uint8)
    frames[:, :32, :32] = 255
    for name, settings in (("first.h264", first), ("second.h264", second)):
        encode_h264(tmp_path / name, frames, settings)
    both = (tmp_path / "first.h264").read_bytes() + (tmp_path / "second.h264").read_bytes()
    (tmp_path / "both.h264").write_bytes(both)
    shown = [quadrants(frame) for frame in read_video(tmp_path / "both.h264").frames]
    assert [divmod(bright.argmax().item(), 2) for bright in shown] == (
        [corners[0]] * 5 + [corners[1]] * 5
    )


def test_the_best_stream_is_read_and_not_the_first(tmp_path):
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        thumbnail = container.add_stream("mjpeg", rate=10)
        thumbnail.width, thumbnail.height, thumbnail.pix_fmt = 16, 16, "yuvj420p"
        stream = container.add_stream("mpeg4", rate=10, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.disposition = av.stream.Disposition.default.value
        black = np.zeros((16, 16, 3), np.uint8)
        container.mux(thumbnail.encode(av.VideoFrame.from_ndarray(black, format="rgb24")))
        for pixels in shade_clip(SHADES).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(thumbnail.encode())
        container.mux(stream.encode())
    video = read_video(tmp_path / "clip.mkv")
    assert video.frames.shape == (12, 32, 48, 3)
    assert shades_of(video.frames) == list(range(12))


@pytest.mark.parametrize(
    "name",
    ["2024-01-01T12:30:00.mp4", "file:clip.mp4", "concat:a|b.mp4", "50%d.mp4", "caf\udce9.mp4"],
)
def test_a_relative_name_is_a_name_whatever_is_in_it(tmp_path, monkeypatch, name):
    write_video(tmp_path / "clip.mp4", shade_clip(SHADES))
    try:
        os.rename(tmp_path / "clip.mp4", tmp_path / name)
    except OSError:
        pytest.skip("no such names in this file system")
    monkeypatch.chdir(tmp_path)
    for path in (name, os.fsencode(name)):
        video = read_video(path)
        assert shades_of(video.frames) == list(range(12))
        assert video.path == name


PICTURES = [
    ("mjpeg", "mjpeg", "yuvj420p", "mjpeg"),
    ("png", "image2pipe", "rgb24", "png"),
    ("bmp", "image2pipe", "bgr24", "bmp"),
    ("libwebp", "webp", "yuv420p", "webp"),
    ("libsvtav1", "avif", "yuv420p", ".*av1.*|.*dav1d"),
]


@pytest.mark.parametrize("name", ["one.jpg", "clip.mp4", "one"])
@pytest.mark.parametrize("codec, container_format, pixel_format, said", PICTURES)
def test_pictures_are_refused(tmp_path, name, codec, container_format, pixel_format, said):
    frames = shade_clip(SHADES[:1], 64, 64)
    encode_pictures(tmp_path / name, frames, codec, container_format, pixel_format)
    with pytest.raises(
        ValueError, match=rf"^expected a video, got a picture \(({said})\)"
    ) as caught:
        read_video(tmp_path / name)
    assert name in str(caught.value) and "AutoProcessor" in str(caught.value)


@pytest.mark.parametrize(
    "name, codec, container_format, pixel_format",
    [
        ("clip.gif", "gif", None, "rgb8"),
        ("clip.png", "apng", "apng", "rgb24"),
        ("clip.mjpeg", "mjpeg", None, "yuvj420p"),
        ("clip.avif", "libsvtav1", "avif", "yuv420p"),
    ],
)
def test_moving_pictures_are_videos(tmp_path, name, codec, container_format, pixel_format):
    frames = shade_clip(SHADES[::4], 64, 64)
    encode_pictures(tmp_path / name, frames, codec, container_format, pixel_format)
    assert shades_of(read_video(tmp_path / name).frames) == [0, 4, 8]


def test_an_animated_webp_is_called_so(tmp_path):
    frames = shade_clip(SHADES[::4])
    encode_pictures(tmp_path / "clip.webp", frames, "libwebp_anim", "webp", "yuv420p")
    message = "animated WebP, for which this build of FFmpeg has no decoder: convert it to MP4"
    with pytest.raises(ValueError, match=rf"{message} first: .*clip\.webp"):
        read_video(tmp_path / "clip.webp")


def test_a_stream_that_changes_size_is_scaled_to_its_first_frame(tmp_path):
    encode(tmp_path / "first.m4v", shade_clip(SHADES[:2], 32, 48), container_format="m4v")
    encode(tmp_path / "second.m4v", shade_clip(SHADES[2:4], 64, 32), container_format="m4v")
    both = (tmp_path / "first.m4v").read_bytes() + (tmp_path / "second.m4v").read_bytes()
    (tmp_path / "both.m4v").write_bytes(both)
    video = read_video(tmp_path / "both.m4v")
    assert video.frames.shape[1:] == (32, 48, 3)
    assert shades_of(video.frames) == [0, 1, 2, 3]


def test_a_single_frame_is_taken_as_it_is(tmp_path):
    write_video(tmp_path / "clip.mp4", shade_clip(SHADES[:1]))
    assert read_video(tmp_path / "clip.mp4").frames.shape[0] == 1
    assert read_video(tmp_path / "clip.mp4", fps=2.0).frames.shape[0] == 1
    with pytest.raises(ValueError, match="num_frames=2 is more than the 1 frame"):
        read_video(tmp_path / "clip.mp4", num_frames=2)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*absent.mp4"):
        read_video(tmp_path / "absent.mp4")


def test_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match="folder"):
        read_video(tmp_path)


@pytest.mark.parametrize("name", ["clip.mp4", "notes.txt", "clip"])
@pytest.mark.parametrize("content", [b"", b"some words\n" * 99, bytes(range(256)) * 20])
def test_not_a_video(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="not a video|no frame|no video stream") as caught:
        read_video(tmp_path / name)
    assert name in str(caught.value)


def test_a_pipe_does_not_block(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes in this file system")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match="regular file"):
        read_video(tmp_path / "pipe.mp4")


@pytest.mark.parametrize("cover", [None, np.full((32, 32, 3), 200, np.uint8)])
def test_audio_only(tmp_path, cover):
    encode_audio(tmp_path / "song.mp4", cover=cover)
    with pytest.raises(ValueError, match="no video stream in the file, which holds audio:"):
        read_video(tmp_path / "song.mp4")


def test_a_video_without_frames(tmp_path):
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    with pytest.raises(ValueError, match="no frames|not a video|no video stream"):
        read_video(tmp_path / "clip.mkv")


def read_damaged(path, **request_):
    """Frames and warnings, or the error; anything but a ValueError is a failure of the test."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return read_video(path, **request_), caught
        except ValueError as error:
            return error, caught


@pytest.mark.parametrize("request_", [{}, {"num_frames": 4}, {"fps": 5.0}])
def test_truncated_file_gives_what_is_left(tmp_path, request_):
    write_video(tmp_path / "whole.mp4", torch.cat([shape_clip()] * 3), fps=10)
    whole = (tmp_path / "whole.mp4").read_bytes()
    lengths = []
    for percent in range(5, 100, 10):
        (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * percent // 100])
        result, caught = read_damaged(tmp_path / "cut.mp4", **request_)
        if isinstance(result, ValueError):
            assert "cut.mp4" in str(result) or "num_frames=4 is more than" in str(result)
            lengths.append(0)
        else:
            assert len(result.frames) == len(result.timestamps) > 0
            assert any("truncated or damaged" in str(warning.message) for warning in caught)
            lengths.append(result.duration)
    assert lengths[0] == 0 and 1.2 < lengths[-1] < 2.4
    assert lengths == sorted(lengths)


def lost_of(caught):
    """The number in the one warning; 0 without a warning."""
    assert len(caught) <= 1
    return int(re.search(r"(\d+) frame\(s\) are lost", str(caught[0].message))[1]) if caught else 0


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
@pytest.mark.parametrize("percent", [40, 60, 85])
def test_a_cut_file_says_how_many_frames_are_lost(tmp_path, suffix, percent):
    name = f"whole{suffix}"
    frames = torch.randint(0, 256, (48, 48, 64, 3), dtype=torch.uint8)
    if suffix == ".mp4":  # with its index in front
        write_video(tmp_path / name, frames, fps=10)
    else:
        encode(tmp_path / name, frames)
    result, caught = read_damaged(tmp_path / name)
    assert len(result.frames) == 48 and not caught
    whole = (tmp_path / name).read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(whole[: len(whole) * percent // 100])
    result, caught = read_damaged(tmp_path / f"cut{suffix}")
    assert lost_of(caught) in (48 - len(result.frames), 48 - len(result.frames) + 1)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
@pytest.mark.parametrize("request_", [{}, {"num_frames": 12}])
def test_damage_in_the_middle_is_said_once(tmp_path, suffix, request_):
    path = tmp_path / f"clip{suffix}"
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (24, 48, 64, 3), dtype=torch.uint8, generator=generator)
    encode(path, frames)
    assert not read_damaged(path, **request_)[1]
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 400] = bytes(torch.randint(0, 256, (400,), generator=generator))
    path.write_bytes(content)
    result, caught = read_damaged(path, **request_)
    assert 1 <= lost_of(caught) <= 24 and len(result.frames) >= 2
    assert str(path) in str(caught[0].message)


def not_coded(time, bits):
    """A packet of MPEG-4 part 2 with a picture that is not coded: show the last one again."""
    word = "01" + "0" + "1" + f"{time:0{bits}b}" + "1" + "0"
    word += "0" + "1" * (-(len(word) + 1) % 8)
    return b"\0\0\1\xb6" + int(word, 2).to_bytes(len(word) // 8, "big")


@pytest.mark.parametrize("request_", [{}, {"num_frames": 12}, {"fps": 5.0}])
@pytest.mark.parametrize("kind", ["held", "skipped"])
def test_moments_without_a_picture_are_no_damage(tmp_path, kind, request_):
    """B-frames in an AVI: the header counts moments at which nothing new is shown."""
    path = tmp_path / "xvid.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"qscale": "2", "vtag": "xvid"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.max_b_frames = 1
        place = 0
        packets = []
        for pixels in shade_clip(SHADES).contiguous().numpy():
            packets += stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
        for index, packet in enumerate([*packets, *stream.encode()]):
            packet.pts, packet.dts = None, place
            container.mux(packet)
            place += 1
            if index in (2, 6, 8):  # behind a B-frame, at the time of the frame that comes after it
                if kind == "skipped":
                    empty = av.Packet(not_coded(index, bits=4))
                    empty.stream, empty.dts, empty.time_base = stream, place, packet.time_base
                    container.mux(empty)
                place += 1
    result, caught = read_damaged(path, **request_)
    assert not caught
    wanted = sample_indices(12, 10.0, **request_).tolist()
    assert shades_of(result.frames) == wanted


def test_an_index_that_was_cut_off_is_not_a_video(tmp_path):
    encode(tmp_path / "whole.mp4", shade_clip(SHADES))
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: whole.index(b"moov") - 4])
    with pytest.raises(ValueError, match="not a video"):
        read_video(tmp_path / "cut.mp4")


def test_overwritten_bytes_end_in_frames_or_a_clear_error(tmp_path):
    write_video(tmp_path / "whole.mp4", shape_clip(), fps=10)
    whole = (tmp_path / "whole.mp4").read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(30):
        damaged = np.frombuffer(whole, dtype=np.uint8).copy()
        places = generator.integers(0, len(damaged), size=40)
        damaged[places] = generator.integers(0, 256, size=40)
        (tmp_path / "damaged.mp4").write_bytes(damaged.tobytes())
        result, _ = read_damaged(tmp_path / "damaged.mp4", num_frames=4)
        if not isinstance(result, ValueError):
            assert result.frames.shape[0] == len(result.timestamps) <= 4


def test_colours_survive(tmp_path):
    frames = shape_clip()
    write_video(tmp_path / "clip.mp4", frames, fps=4)
    video = read_video(tmp_path / "clip.mp4")
    assert video.frames.shape == frames.shape and video.fps == 4.0
    error = (video.frames.int() - frames.int()).abs().float()
    assert error.mean() < 1.0
    assert error.quantile(0.99) <= 6


def test_browser_format_keeps_the_colour_inside_shapes(tmp_path):
    frames = shape_clip()
    write_video(tmp_path / "clip.mp4", frames, fps=4, pixel_format="yuv420p")
    error = (read_video(tmp_path / "clip.mp4").frames.int() - frames.int()).abs().float()
    assert error.median() <= 2 and error.mean() < 5


@pytest.mark.parametrize("fps", [1, 8.0, 23.976, 29.97, 0.5, Fraction(30000, 1001)])
def test_frame_rates(tmp_path, fps):
    write_video(tmp_path / "clip.mp4", shade_clip(SHADES[:4]), fps=fps)
    video = read_video(tmp_path / "clip.mp4")
    assert video.fps == pytest.approx(float(fps), rel=1e-4)
    assert video.duration == pytest.approx(4 / float(fps), rel=1e-4)


@pytest.mark.skipif("libx264" not in av.codecs_available, reason="MPEG-4 has even sizes only")
def test_odd_sizes(tmp_path):
    frames = shape_clip(height=85, width=83)
    write_video(tmp_path / "clip.mp4", frames)
    assert (read_video(tmp_path / "clip.mp4").frames.int() - frames.int()).abs().float().mean() < 1


def test_without_libx264(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    write_video(tmp_path / "clip.mp4", shape_clip(), fps=4)
    error = (read_video(tmp_path / "clip.mp4").frames.int() - shape_clip().int()).abs().float()
    assert error.median() <= 3 and error.mean() < 8
    with pytest.raises(ValueError, match="even height and width, got 85x84"):
        write_video(tmp_path / "odd.mp4", shape_clip(height=85))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    write_video(path, shade_clip(SHADES[:2]))
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(writing.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_video(path, shade_clip(SHADES))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(
    ("frames", "options", "error", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), {}, TypeError, "uint8 tensor, got ndarray"),
        (torch.zeros(2, 8, 8, 3), {}, TypeError, "uint8 tensor, got torch.float32"),
        (torch.zeros(2, 3, 8, 8).byte(), {}, ValueError, r"\[T, H, W, 3\].*got \[2, 3, 8, 8\]"),
        (torch.zeros(0, 8, 8, 3).byte(), {}, ValueError, "at least 1, got"),
        (shade_clip(SHADES), {"fps": 0}, ValueError, "fps must be positive and finite, got 0"),
        (shade_clip(SHADES), {"fps": float("inf")}, ValueError, "fps must be positive"),
        (shade_clip(SHADES), {"pixel_format": "gray"}, ValueError, "pixel_format must be"),
        (shade_clip(SHADES), {"quality": 52}, ValueError, "quality must be between 0 and 51"),
        (
            shade_clip(SHADES, 31, 48),
            {"pixel_format": "yuv420p"},
            ValueError,
            "even height and width, got 31x48",
        ),
    ],
)
def test_what_cannot_be_written(tmp_path, frames, options, error, message):
    with pytest.raises(error, match=message):
        write_video(tmp_path / "clip.mp4", frames, **options)
    assert not list(tmp_path.iterdir())


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_video(tmp_path / "absent" / "clip.mp4", shade_clip(SHADES))
