"""Reading and writing video files; every file is made here."""

import os
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from lvspec.video import files as video_module
from lvspec.video import read_video, sample_indices, write_video

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
    height, width = upright.shape[1] // 2, upright.shape[2] // 2
    quadrants = upright[0].float().reshape(2, height, 2, width, 3).mean(dim=(1, 3, 4))
    assert divmod(quadrants.argmax().item(), 2) == corner
    assert quadrants.flatten().sort().values[:3].max() < 20 < 230 < quadrants.max()


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
    monkeypatch.setattr(video_module.av, "codecs_available", {"mpeg4"})
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

    monkeypatch.setattr(video_module.os, "replace", fail)
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
