"""Preprocessing against HuggingFace's own video processor, and by hand.

HuggingFace's processor needs torchvision. Where that is installed it runs as it is; elsewhere it
runs beside a stand-in for the few functions it calls. The stand-in resizes with the same call to
torch as `preprocess_video`, so the resize is checked against Pillow as well.
"""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from lvspec.video import Video, patches, sample_indices
from lvspec.video.config import VideoProcessorConfig
from lvspec.video.patches import load_video_processor, preprocess_video
from lvspec.video.resizing import smart_resize

HAS_TORCHVISION = find_spec("torchvision") is not None

STAND_IN = {
    "torchvision-0.28.0.dist-info/METADATA": "Name: torchvision\nVersion: 0.28.0\n",
    "torchvision/__init__.py": "__version__ = '0.28.0'\n",
    "torchvision/io.py": "ImageReadMode = decode_image = None\n",
    "torchvision/transforms/__init__.py": """
        from enum import Enum
        class InterpolationMode(Enum):
            NEAREST = "nearest"
            NEAREST_EXACT = "nearest-exact"
            BILINEAR = "bilinear"
            BICUBIC = "bicubic"
            BOX = "box"
            HAMMING = "hamming"
            LANCZOS = "lanczos"
        """,
    "torchvision/transforms/functional.py": "pil_to_tensor = None\n",
    "torchvision/transforms/v2/__init__.py": "",
    "torchvision/transforms/v2/functional.py": """
        import torch
        from torchvision.transforms import InterpolationMode
        def resize(image, size, interpolation, antialias):
            if tuple(size) == tuple(image.shape[-2:]):
                return image
            flat = torch.nn.functional.interpolate(
                image.flatten(0, -4), list(size), mode=interpolation.value, antialias=antialias
            )
            return flat.reshape(*image.shape[:-2], *size)
        def normalize(image, mean, std, inplace=False):
            mean, std = (torch.as_tensor(part)[:, None, None] for part in (mean, std))
            return (image - mean) / std
        def crop(image, top, left, height, width):
            return image[..., top : top + height, left : left + width]
        def pad(image, padding, fill=0):
            left, top, right, bottom = padding
            return torch.nn.functional.pad(image, (left, right, top, bottom), value=fill)
        def grayscale_to_rgb(image):
            return image
        """,
}

# Runs where torchvision or its stand-in imports: one file of requests in, one of answers out.
HUGGINGFACE = """
    import sys, torch
    torch.set_num_threads(1)
    from lvspec.video.config import VideoProcessorConfig
    from lvspec.video.patches import load_video_processor
    from transformers import Qwen2VLVideoProcessor
    from transformers.video_utils import VideoMetadata
    requests = torch.load(sys.argv[1])
    answers = {"patches": [], "parts": [], "samples": [], "families": []}
    for frames, config in requests["patches"]:
        processor = load_video_processor(VideoProcessorConfig(**config), "hf")
        assert processor.backend == "hf"
        answers["patches"].append(tuple(processor.process(frames, sampled_fps=4.0)))
        parts = [processor.resize(frame, len(frames)) for frame in frames.split(1)]
        inputs = processor.process(torch.cat(parts), sampled_fps=4.0, resized=True)
        answers["parts"].append(tuple(inputs))
    for total_frames, fps, request in requests["samples"]:
        metadata = VideoMetadata(total_num_frames=total_frames, fps=fps)
        try:
            answer = Qwen2VLVideoProcessor().sample_frames(metadata, **request).tolist()
        except (ValueError, ZeroDivisionError) as error:
            answer = type(error).__name__
        answers["samples"].append(answer)
    folder = sys.argv[3]
    Qwen2VLVideoProcessor(patch_size=12, min_pixels=100, max_pixels=90000).save_pretrained(folder)
    loaded = load_video_processor(sys.argv[4], "auto")
    frames, config = requests["patches"][0]
    from lvspec.video.hf_resizing import frame_resize
    import transformers
    for name, settings in requests["families"].items():
        processor = getattr(transformers, name)(**settings)
        resize = frame_resize(processor)
        for clip in requests["clips"]:
            given = {"do_sample_frames": False, "return_tensors": "pt"}
            whole = processor([clip.permute(0, 3, 1, 2)], **given)
            resized = torch.cat([resize(frame, len(clip)) for frame in clip.split(1)])
            parts = processor([resized.permute(0, 3, 1, 2)], do_resize=False, **given)
            assert whole.keys() == parts.keys()
            kept = resized.shape[1:3] == clip.shape[1:3]
            same = all(whole[key].equal(parts[key]) for key in whole)
            answers["families"].append((name, kept, same))
    answers["loaded"] = (loaded.backend, *loaded.process(frames, sampled_fps=4.0))
    torch.save(answers, sys.argv[2])
"""

CONFIGS = {
    "default": {},
    "tiny": {"min_pixels": 28 * 28, "max_pixels": 84 * 84},
    "checkpoint": {"min_pixels": 3136, "max_pixels": 12845056},
    "shrink": {"min_pixels": 784, "max_pixels": 5000},
    "bilinear": {"min_pixels": 784, "max_pixels": 20000, "resample": "bilinear"},
    "patches": {
        "patch_size": 6,
        "temporal_patch_size": 3,
        "merge_size": 3,
        "min_pixels": 2000,
        "max_pixels": 9000,
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (0.5, 0.6, 0.7),
    },
    "no_merge": {"temporal_patch_size": 1, "merge_size": 1, "min_pixels": 200, "max_pixels": 9000},
    "no_rescale": {"min_pixels": 784, "max_pixels": 7056, "do_rescale": False},
    "no_normalize": {"min_pixels": 784, "max_pixels": 7056, "do_normalize": False},
}
SIZES = [(84, 84), (83, 121), (17, 301), (5, 9), (131, 60), (240, 322)]
FRAME_COUNTS = [1, 2, 5]
CASES = [
    (name, size, num_frames)
    for name in CONFIGS
    for size in SIZES
    for num_frames in FRAME_COUNTS
    if num_frames == 5 or size == (83, 121)
]
SAMPLES = [
    (total_frames, 12.5, request)
    for total_frames in (1, 2, 3, 4, 7, 8, 31, 100, 999, 2999)
    for request in (
        [{"num_frames": number} for number in (2, 3, 4, 5, 6, 7, 30, 32, 740, 768)]
        + [{"fps": fps} for fps in (0.1, 1, 2.0, 3.7, 12.5, 60)]
        + [{"fps": 2.0, "max_frames": 5}, {"fps": 0.5, "min_frames": 8}]
        + [{"fps": 5.0, "temporal_patch_size": 1}, {"num_frames": 7, "temporal_patch_size": 4}]
    )
]


# HF's video processors, with settings that make frames of the sizes below larger or smaller.
FAMILIES = {
    "Qwen2VLVideoProcessor": {"size": {"shortest_edge": 784, "longest_edge": 20000}},
    "Qwen3VLVideoProcessor": {"size": {"shortest_edge": 4096, "longest_edge": 6 * 20000}},
    "LlavaOnevisionVideoProcessor": {"size": {"height": 48, "width": 48}},
    "LlavaNextVideoVideoProcessor": {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 28, "width": 28},
    },
    "InternVLVideoProcessor": {"size": {"height": 56, "width": 56}},
    "SmolVLMVideoProcessor": {
        "size": {"longest_edge": 90},
        "max_image_size": {"longest_edge": 64},
    },
}


def noise(num_frames, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (num_frames, height, width, 3), dtype=torch.uint8, generator=generator
    )


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    """What HuggingFace's code answers to CASES and SAMPLES, and the folder it saved."""
    folder = tmp_path_factory.mktemp("huggingface")
    paths = [] if HAS_TORCHVISION else [str(folder)]
    if not HAS_TORCHVISION:
        for name, text in STAND_IN.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(textwrap.dedent(text))
    VideoProcessorConfig(**CONFIGS[CASES[0][0]]).save_pretrained(folder / "ours")
    requests = [(noise(count, *size), CONFIGS[name]) for name, size, count in CASES]
    clips = [noise(6, *size) for size in ((83, 121), (240, 322), (64, 48))]
    asked = {"patches": requests, "samples": SAMPLES, "families": FAMILIES, "clips": clips}
    torch.save(asked, folder / "requests.pt")
    (folder / "ask.py").write_text(textwrap.dedent(HUGGINGFACE))
    paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
    command = [sys.executable, "ask.py", "requests.pt", "answers.pt", "saved", "ours"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return folder, torch.load(folder / "answers.pt")


@pytest.mark.parametrize("name", CONFIGS)
def test_patches_equal_huggingface(huggingface, name):
    answers = huggingface[1]["patches"]
    processor = load_video_processor(VideoProcessorConfig(**CONFIGS[name]), "torch")
    for case, expected in zip(CASES, answers):
        if case[0] != name:
            continue
        inputs = processor.process(noise(case[2], *case[1]), sampled_fps=4.0)
        assert inputs.pixel_values_videos.dtype == torch.float32
        assert inputs.video_grid_thw.dtype == torch.int64
        assert inputs.video_grid_thw.tolist() == expected[1].tolist()
        torch.testing.assert_close(inputs.pixel_values_videos, expected[0], rtol=0, atol=1e-6)
        assert inputs.second_per_grid_ts.tolist() == expected[2].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_frames_resized_one_at_a_time_give_the_same(huggingface, name):
    """Bit for bit, here and by HuggingFace's own resizing."""
    answers = huggingface[1]
    processor = load_video_processor(VideoProcessorConfig(**CONFIGS[name]), "torch")
    for case, whole, parts in zip(CASES, answers["patches"], answers["parts"]):
        if case[0] != name:
            continue
        assert all(one.equal(other) for one, other in zip(whole, parts))
        frames = noise(case[2], *case[1])
        resized = torch.cat([processor.resize(frame, len(frames)) for frame in frames.split(1)])
        for one, other in zip(processor.process(frames), processor.process(resized, resized=True)):
            assert one.equal(other)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_resize_one_at_a_time_as_huggingface_does(huggingface, name):
    answers = [answer[1:] for answer in huggingface[1]["families"] if answer[0] == name]
    assert len(answers) == 3 and all(same for _, same in answers)
    assert not all(kept for kept, _ in answers), "nothing was resized"


def test_frames_as_a_list_or_an_array():
    frames = noise(4, 60, 80)
    processor = load_video_processor(VideoProcessorConfig(min_pixels=784), "torch")
    expected = processor.process(frames)
    array = frames.numpy()
    read_only = array.copy()
    read_only.flags.writeable = False
    reversed_twice = np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    pictures = [Image.fromarray(frame) for frame in array]
    for given in (array, read_only, reversed_twice, list(array), list(frames), pictures):
        for one, other in zip(processor.process(given), expected):
            assert one.equal(other)


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        ([], ValueError, "frames: expected frames .* of one size, got none"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], ValueError, "of one size"),
        (["a.mp4", "b.mp4"], TypeError, "frames: expected numbers, got an array of <U5"),
        (np.zeros((2, 8, 8, 3)), TypeError, "uint8 tensor, got torch.float64"),
        (np.zeros((8, 8, 3), np.uint8), ValueError, r"must be \[T, H, W, 3\].*got \[8, 8, 3\]"),
        ({"frames": 3}, TypeError, "uint8 tensor, got dict"),
    ],
)
def test_what_are_no_frames(frames, error, message):
    processor = load_video_processor(VideoProcessorConfig(min_pixels=784), "torch")
    with pytest.raises(error, match=message):
        processor.process(frames)


def test_samples_equal_huggingface(huggingface):
    agreed = 0
    for (total_frames, fps, request), expected in zip(SAMPLES, huggingface[1]["samples"]):
        try:
            indices = sample_indices(total_frames, fps, **request).tolist()
        except ValueError:
            assert expected == "ValueError", request
            continue
        if expected == "ZeroDivisionError":
            assert indices == list(range(len(indices))) and indices
        elif expected == "ValueError":
            # Rounded up past the end by HuggingFace: rounded down here.
            assert request["num_frames"] <= total_frames
        else:
            # An index past the end is one that HuggingFace's own reader could not meet.
            assert indices == [index for index in expected if index < total_frames], request
            agreed += 1
    assert agreed > len(SAMPLES) / 2


def test_configuration_files_are_shared(huggingface):
    folder, answers = huggingface
    config = VideoProcessorConfig.from_pretrained(folder / "saved")
    assert config == VideoProcessorConfig(patch_size=12, min_pixels=100, max_pixels=90000)
    backend, patches, grid, _ = answers["loaded"]
    assert backend == "hf"
    assert torch.equal(patches, answers["patches"][0][0])
    assert torch.equal(grid, answers["patches"][0][1])


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(83, 121), (40, 30), (300, 17)])
def test_resize_equals_pillow(size, resample):
    config = VideoProcessorConfig(
        min_pixels=784, max_pixels=8000, resample=resample, do_rescale=False, do_normalize=False
    )
    # Away from black and white: Pillow may take rows before columns, and clips in between.
    frames = noise(1, *size) // 2 + 64
    patches, grid = preprocess_video(frames, config)
    height, width = (14 * number for number in grid[0, 1:].tolist())
    assert (height, width) != size
    method = Image.Resampling[resample.upper()]
    picture = Image.fromarray(frames[0].numpy()).resize((width, height), method)
    resized = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    resized = resized.reshape(1, height, width, 3)
    expected, _ = preprocess_video(resized, replace(config, do_resize=False))
    assert (patches - expected).abs().max() <= 1


def test_patch_order_by_hand():
    # One pixel a patch, merged two by two: 2 x 4 pixels are two squares of four patches.
    config = VideoProcessorConfig(
        patch_size=1,
        temporal_patch_size=2,
        merge_size=2,
        do_resize=False,
        do_rescale=False,
        do_normalize=False,
    )
    rows = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    first = torch.stack([rows, rows + 10, rows + 20], dim=-1)
    frames = torch.stack([first, first + 100, first + 200]).byte()
    patches, grid = preprocess_video(frames, config)
    assert grid.tolist() == [[2, 2, 4]]
    # Channel after channel, each with its two frames; the third frame is repeated.
    assert patches[:8, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert patches[0].tolist() == [0, 100, 10, 110, 20, 120]
    assert patches[5].tolist() == [3, 103, 13, 113, 23, 123]
    assert patches[8].tolist() == [200, 200, 210, 210, 220, 220]


def test_pixels_inside_a_patch_by_hand():
    config = VideoProcessorConfig(
        patch_size=2,
        temporal_patch_size=1,
        merge_size=1,
        do_resize=False,
        image_mean=(0.0, 0.5, 1.0),
        image_std=(1.0, 0.5, 0.25),
    )
    red = torch.tensor([[0, 51, 102, 153], [204, 255, 0, 51]])
    frames = torch.stack([red, red, red], dim=-1)[None].byte()
    patches, grid = preprocess_video(frames, config)
    assert grid.tolist() == [[1, 1, 2]]
    first = [0.0, 0.2, 0.8, 1.0, -1.0, -0.6, 0.6, 1.0, -4.0, -3.2, -0.8, 0.0]
    assert patches[0].tolist() == pytest.approx(first, abs=1e-6)
    second = [0.4, 0.6, 0.0, 0.2, -0.2, 0.2, -1.0, -0.6, -2.4, -1.6, -4.0, -3.2]
    assert patches[1].tolist() == pytest.approx(second, abs=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (84, 84, (84, 84)),
        (83, 121, (84, 112)),
        (10, 10, (28, 28)),
        (1080, 1920, (420, 756)),
        (14, 2800, (28, 420)),
        (20, 4000, (28, 4004)),
    ],
)
def test_smart_resize_literals(height, width, expected):
    size = smart_resize(height, width, factor=28, min_pixels=784, max_pixels=420 * 770)
    assert size == expected


def test_total_budget_shrinks_long_videos():
    limits = {"min_pixels": 784, "max_pixels": 200 * 784, "max_video_tokens": 40}
    free = VideoProcessorConfig(**limits)
    capped = VideoProcessorConfig(**limits, cap_pixels_per_frame=True)
    frames = noise(8, 112, 112)
    assert preprocess_video(frames, free)[1].tolist() == [[4, 8, 8]]
    # 40 tokens, 90 % of them, over 4 steps of the grid: 9 tokens a step.
    assert preprocess_video(frames, capped)[1].tolist() == [[4, 6, 6]]


def test_a_video_knows_its_seconds_per_step():
    frames = noise(4, 56, 56)
    video = Video(frames, torch.arange(4) / 2.0, 2.0, 30.0, "clip.mp4")
    processor = load_video_processor(VideoProcessorConfig(min_pixels=784), "torch")
    inputs = processor.process(video)
    assert inputs.second_per_grid_ts.tolist() == [1.0]
    assert set(inputs._asdict()) == {
        "pixel_values_videos",
        "video_grid_thw",
        "second_per_grid_ts",
    }
    bare = processor.process(frames)
    assert torch.equal(bare.pixel_values_videos, inputs.pixel_values_videos)
    assert bare.second_per_grid_ts.tolist() == pytest.approx([2 / 24])
    with pytest.raises(ValueError, match="sampled_fps must be positive and finite, got 0"):
        processor.process(frames, sampled_fps=0)


@pytest.mark.parametrize(
    ("frames", "options", "error", "message"),
    [
        (torch.zeros(2, 28, 28, 3), {}, TypeError, "uint8 tensor, got torch.float32"),
        (torch.zeros(28, 28, 3).byte(), {}, ValueError, r"\[T, H, W, 3\].*got \[28, 28, 3\]"),
        (torch.zeros(0, 28, 28, 3).byte(), {}, ValueError, "at least 1"),
        (torch.zeros(2, 1, 201, 3).byte(), {}, ValueError, "200 times the other.*1x201"),
        (
            torch.zeros(2, 28, 42, 3).byte(),
            {"do_resize": False},
            ValueError,
            r"multiples of patch_size \* merge_size = 28, got 28x42",
        ),
    ],
)
def test_frames_that_cannot_be_processed(frames, options, error, message):
    with pytest.raises(error, match=message):
        preprocess_video(frames, VideoProcessorConfig(**options))


def test_frames_are_not_changed():
    frames = noise(2, 56, 56)
    before = frames.clone()
    preprocess_video(frames, VideoProcessorConfig(min_pixels=784))
    preprocess_video(frames, VideoProcessorConfig(do_resize=False))
    assert torch.equal(frames, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"min_pixels": 10, "max_pixels": 9}, "min_pixels=10 exceeds max_pixels=9"),
        ({"resample": "lanczos"}, "'bicubic' or 'bilinear', got 'lanczos'"),
        ({"image_mean": (0.5,)}, "image_mean must have three numbers"),
    ],
)
def test_configurations_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        VideoProcessorConfig(**options)


def test_configuration_survives_saving(tmp_path):
    config = VideoProcessorConfig(
        patch_size=7,
        min_pixels=196,
        max_pixels=19600,
        resample="bilinear",
        image_std=(0.5, 0.25, 1.0),
        cap_pixels_per_frame=True,
    )
    config.save_pretrained(tmp_path / "model")
    assert VideoProcessorConfig.from_pretrained(tmp_path / "model") == config
    file = tmp_path / "model" / "video_preprocessor_config.json"
    assert VideoProcessorConfig.from_pretrained(str(file)) == config
    assert json.loads(file.read_text())["size"] == {"shortest_edge": 196, "longest_edge": 19600}


def test_configuration_files_in_huggingface_order(tmp_path):
    def write(name, values):
        (tmp_path / name).write_text(json.dumps(values))

    # The file of published Qwen2.5-VL checkpoints, which has no video processor of its own.
    legacy = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    write("preprocessor_config.json", legacy)
    assert VideoProcessorConfig.from_pretrained(tmp_path) == VideoProcessorConfig(
        min_pixels=3136, max_pixels=12845056
    )
    write("video_preprocessor_config.json", {"patch_size": 12, "min_pixels": None})
    write("processor_config.json", {"processor_class": "Qwen2_5_VLProcessor"})
    assert VideoProcessorConfig.from_pretrained(tmp_path) == VideoProcessorConfig(patch_size=12)
    nested = {
        "video_processor": {"patch_size": 16, "resample": 2, "size": {"longest_edge": 200704}}
    }
    write("processor_config.json", nested)
    expected = VideoProcessorConfig(patch_size=16, resample="bilinear", max_pixels=200704)
    assert VideoProcessorConfig.from_pretrained(tmp_path) == expected
    assert VideoProcessorConfig.from_pretrained(tmp_path / "processor_config.json") == expected
    with pytest.raises(FileExistsError, match="processor_config.json holds a video processor"):
        VideoProcessorConfig().save_pretrained(tmp_path)


def test_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected one of processor_config.json"):
        VideoProcessorConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder, a file nor a model"):
        VideoProcessorConfig.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "expected a JSON object .* got list"),
        ('{"video_processor_type": "LlavaOnevisionVideoProcessor"}', "got LlavaOnevision"),
        ('{"resample": 0}', r"resample must be 2 \(bilinear\) or 3 \(bicubic\), got 0"),
    ],
)
def test_configuration_of_something_else(tmp_path, text, message):
    (tmp_path / "video_preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        VideoProcessorConfig.from_pretrained(tmp_path)


def test_backend_is_a_choice():
    with pytest.raises(ValueError, match="backend must be 'auto', 'hf' or 'torch', got 'cuda'"):
        load_video_processor(VideoProcessorConfig(), "cuda")
    assert load_video_processor(VideoProcessorConfig(), "torch").backend == "torch"


def test_without_torchvision(monkeypatch):
    obstacle = RuntimeError("operator torchvision::nms does not exist")
    monkeypatch.setattr(patches, "_huggingface_obstacle", lambda: obstacle)
    assert load_video_processor(VideoProcessorConfig()).backend == "torch"
    with pytest.raises(ImportError, match="pip install pillow torchvision.*nms does not exist"):
        load_video_processor(VideoProcessorConfig(), "hf")


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is installed")
def test_the_obstacle_is_found():
    assert load_video_processor(VideoProcessorConfig()).backend == "torch"
    with pytest.raises(ImportError, match="No module named 'torchvision'"):
        load_video_processor(VideoProcessorConfig(), "hf")
