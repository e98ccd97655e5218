"""Processor: a video and a prompt become the inputs that HF's processor would return."""

import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from lvspec.cli.captioning import _Captioner
from lvspec.video import read_video, write_video
from lvspec.video.config import VideoProcessorConfig
from lvspec.video.patches import load_video_processor
from lvspec.video.processor import Processor

VIDEO, START, END, IM_START, IM_END = 6, 3, 4, 1, 2


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds of 16 frames; the configuration of the random pair makes them 84 x 84."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    frames = torch.randint(0, 256, (16, 84, 84, 3), dtype=torch.uint8)
    write_video(path, frames, fps=8)
    return path


@pytest.fixture
def processor(random_pair_folders):
    return Processor.from_pretrained(random_pair_folders[0])


@pytest.fixture
def words(random_pair_folders):
    """`words(text)`: ids of a text without special tokens, by a tokenizer of its own."""
    tokenizer = AutoTokenizer.from_pretrained(random_pair_folders[0])
    return lambda text: tokenizer(f" {text}", add_special_tokens=False).input_ids


@pytest.mark.parametrize("frames, grid", [(4, [2, 6, 6]), (8, [4, 6, 6]), (2, [1, 6, 6])])
def test_placeholder_becomes_one_per_video_token(processor, clip, words, frames, grid):
    inputs = processor(clip, "describe the video", num_frames=frames)
    assert inputs["video_grid_thw"].tolist() == [grid]
    count = grid[0] * 6 * 6 // 4
    ids = [IM_START, *words("user"), START, *[VIDEO] * count, END]
    ids += [*words("describe the video"), IM_END, IM_START, *words("assistant")]
    assert inputs["input_ids"].tolist() == [ids]
    assert inputs["attention_mask"].tolist() == [[1] * len(ids)]
    assert inputs["mm_token_type_ids"].tolist() == [[2 * (token == VIDEO) for token in ids]]
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert inputs[name].dtype == torch.int64


def test_several_prompts_about_one_video(processor, clip):
    """Each as by itself; what is the video's is one tensor."""
    prompts = ["describe the video", "the video"]
    several = processor(clip, prompts, num_frames=4)
    for prompt, inputs in zip(prompts, several, strict=True):
        alone = processor(clip, prompt, num_frames=4)
        assert list(inputs) == list(alone)
        assert all(value.equal(alone[name]) for name, value in inputs.items())
    assert several[0]["pixel_values_videos"] is several[1]["pixel_values_videos"]
    assert processor(clip, [], num_frames=4) == []


def test_another_process_may_have_it(processor, clip):
    ours, theirs = processor(clip, "what?"), pickle.loads(pickle.dumps(processor))(clip, "what?")
    assert ours.keys() == theirs.keys() and all(x.equal(theirs[name]) for name, x in ours.items())


def test_pixels_are_those_of_the_video_processor(processor, clip):
    video = read_video(clip, num_frames=8)
    wanted = processor.video_processor.process(video)
    for given, sampling in ((clip, {"num_frames": 8}), (str(clip), {"num_frames": 8}), (video, {})):
        inputs = processor(given, "describe the video", **sampling)
        assert list(inputs)[3:] == list(wanted._fields)
        for name, value in wanted._asdict().items():
            assert inputs[name].equal(value)


@pytest.mark.parametrize("sampling, frames", [({}, 4), ({"fps": 4.0}, 8), ({"num_frames": 6}, 6)])
def test_sampling(processor, clip, sampling, frames):
    """Two seconds; by default two frames a second."""
    inputs = processor(clip, "describe the video", **sampling)
    assert inputs["video_grid_thw"].tolist() == [[frames // 2, 6, 6]]
    assert inputs["second_per_grid_ts"].tolist() == [pytest.approx(2 * 2 / frames)]


def test_frames_of_no_file(processor, clip):
    """A list, an array or a tensor; how many are a second is for `fps` to say."""
    video = read_video(clip, num_frames=8)
    wanted = processor(video, "describe the video")
    frames = video.frames
    for given in (frames, frames.numpy(), list(frames.numpy()), tuple(frames)):
        inputs = processor(given, "describe the video", fps=4.0)
        assert list(inputs) == list(wanted)
        for name, value in wanted.items():
            assert inputs[name].equal(value), name
    assert processor(frames, "describe")["second_per_grid_ts"].tolist() == [pytest.approx(2 / 24)]
    with pytest.raises(ValueError, match="^num_frames: expected None for frames .* no file, got 4"):
        processor(frames, "describe", num_frames=4)
    with pytest.raises(ValueError, match="^fps: expected a number > 0, got 0"):
        processor(frames, "describe", fps=0)
    with pytest.raises(TypeError, match="uint8 tensor, got torch.float32"):
        processor(frames.float(), "describe")


def test_a_picture_is_no_video(processor, tmp_path):
    Image.new("RGB", (84, 84)).save(tmp_path / "one.jpg")
    with pytest.raises(ValueError, match=r"^expected a video, got a picture \(mjpeg\).*one\.jpg"):
        processor(tmp_path / "one.jpg", "describe")


@pytest.mark.parametrize(
    "size", [pytest.param((1080, 1920), marks=pytest.mark.slow), (270, 480), (500, 300)]
)
def test_no_more_than_a_frame_is_kept_at_full_size(processor, tmp_path, monkeypatch, size):
    """The same pixels as from all frames at once, bit for bit."""
    frames = torch.randint(0, 256, (6, *size, 3), dtype=torch.uint8)
    write_video(tmp_path / "clip.mp4", frames, fps=8)
    wanted = processor(read_video(tmp_path / "clip.mp4"), "describe")
    kept = []
    new_empty = torch.Tensor.new_empty

    def watched(tensor, *shape, **options):
        kept.append(shape)
        return new_empty(tensor, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", watched)
    inputs = processor(tmp_path / "clip.mp4", "describe", fps=8.0)
    _, rows, columns = inputs["video_grid_thw"][0].tolist()
    assert kept == [(6, 14 * rows, 14 * columns, 3)]
    for name, value in wanted.items():
        assert inputs[name].equal(value), name


PEAK = r"""
    import re, sys
    from lvspec.video import read_video
    from lvspec.video.config import VideoProcessorConfig
    from lvspec.video.patches import load_video_processor
    config = VideoProcessorConfig(min_pixels=784, max_pixels=84 * 84)
    processor = load_video_processor(config, "torch")
    for path in sys.argv[1:]:
        video = read_video(path, resize=processor.resize)
        processor.process(video, resized=True)
        status = open("/proc/self/status").read()
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_frames_of_full_size(tmp_path):
    """64 frames of 1080p are 380 MB, and 190 MB as the decoder has them; resized: 1 MB."""
    frame = torch.full((1, 1080, 1920, 3), 90, dtype=torch.uint8)
    paths = [tmp_path / name for name in ("short.mp4", "long.mp4")]
    for path, num_frames in zip(paths, (4, 64)):
        write_video(path, frame.expand(num_frames, -1, -1, -1), pixel_format="yuv420p")
    (tmp_path / "peak.py").write_text(textwrap.dedent(PEAK))
    command = [sys.executable, tmp_path / "peak.py", *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert many - few < 60


def test_a_draft_with_a_processor_of_its_own_reads_the_file_too(processor, clip, tmp_path):
    """As the shell calls both: each has its own size of frames, and a damage is said once."""
    whole = clip.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    config = VideoProcessorConfig(min_pixels=784, max_pixels=28 * 28)
    small = replace(processor, video_processor=load_video_processor(config, "torch"))
    captioner = SimpleNamespace(
        arguments=SimpleNamespace(num_frames=4, fps=None, prompt="describe"),
        models=SimpleNamespace(
            target=SimpleNamespace(device="cpu"), processor=processor, draft_processor=small
        ),
    )
    with pytest.warns(UserWarning, match=r"frame\(s\) are lost") as caught:
        inputs, draft_inputs = _Captioner._read(captioner, str(tmp_path / "cut.mp4"), "cpu")
    assert len(caught) == 1
    assert inputs["video_grid_thw"].tolist() == [[2, 6, 6]]
    assert draft_inputs["video_grid_thw"].tolist() == [[2, 2, 2]]


def test_sampling_twice(processor, clip):
    with pytest.raises(ValueError, match="num_frames"):
        processor(clip, "describe", num_frames=4, fps=2.0)
    video = read_video(clip, num_frames=8)
    for sampling in ({"num_frames": 4}, {"fps": 1.0}):
        with pytest.raises(ValueError, match=r"^num_frames, fps: expected None for .* read before"):
            processor(video, "describe", **sampling)


def test_whole_chat_prompt(processor, clip, words):
    prompt = "<|im_start|> system describe<|im_end|><|vision_start|><|video_pad|><|vision_end|> the"
    inputs = processor(clip, prompt, num_frames=4)
    ids = [IM_START, *words("system describe"), IM_END, START, *[VIDEO] * 18, END, *words("the")]
    assert inputs["input_ids"].tolist() == [ids]


def test_placeholder_twice(processor, clip):
    prompt = "<|video_pad|> and <|video_pad|>"
    with pytest.raises(ValueError, match=r"^prompt: expected .*<\|video_pad\|> once .*, got 2 in"):
        processor(clip, prompt, num_frames=4)


def test_template_without_a_placeholder(processor, clip):
    processor.tokenizer.chat_template = "{{ messages[0]['content'][1]['text'] }}"
    with pytest.raises(ValueError, match=r"^prompt: expected .*<\|video_pad\|> once .*, got 0 in"):
        processor(clip, "describe", num_frames=4)


def test_device(processor, clip):
    inputs = processor(clip, "describe", num_frames=4, device="meta")
    assert {value.device.type for value in inputs.values()} == {"meta"}


def test_missing_files(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):
        processor(tmp_path / "nowhere.mp4", "describe")
    with pytest.raises(OSError):
        Processor.from_pretrained(tmp_path / "nowhere")


def test_inputs_are_what_the_model_takes(processor, random_pair, clip, hf_greedy):
    inputs = processor(clip, "describe the video", num_frames=8)
    assert len(hf_greedy(random_pair[0], inputs, 5)) == 5
