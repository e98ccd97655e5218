"""HFProcessor: HF's processor of a family, called with one video and a prompt."""

from importlib.util import find_spec

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoProcessor,
    PreTrainedTokenizerFast,
)
from transformers.video_processing_utils import BaseVideoProcessor

from lvspec import AcceptancePolicy, DecodeConfig, generate
from lvspec.models.loading import load_processor, prepare_alike
from lvspec.video import Video, read_video, write_video
from lvspec.video.processor import HFProcessor, Processor

WORDS = ["<pad>", "<s>", "</s>", "<image>", "<video>", "describe", "the", "video", "assistant"]
TEMPLATE = (
    "<s>{% for part in messages[0]['content'] %}{% if part['type'] == 'video' %} <video>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %} assistant"
)
SQUARE = {"height": 16, "width": 16}


@pytest.fixture
def tokenizer():
    vocabulary = {word: index for index, word in enumerate([*WORDS, "<unk>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<video>"],
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds of 16 frames."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, torch.randint(0, 256, (16, 48, 64, 3), dtype=torch.uint8), fps=8)
    return path


class DoubleVideoProcessor:
    """As much of HF's video processors as is called: frames are resized first, by HF's base."""

    def __init__(self, size=16):
        self.size = size

    def __call__(self, videos, **given):
        (frames,) = videos
        return {"pixel_values_videos": self.resize(frames[None], size=self.size, resample=3)}


class OwnVideoProcessor(DoubleVideoProcessor):
    """Resizes in a way of its own."""

    def resize(self, videos, **given):
        return videos[..., ::2, ::2]


@pytest.fixture
def hf_resize(monkeypatch):
    """HF's base without torchvision: every second row and third column. Shapes that came."""
    shapes = []

    def resize(self, image, size, resample):
        assert (size, resample) == (16, 3)
        if image.device.type != "meta":
            shapes.append(tuple(image.shape))
        return image[..., ::2, ::3]

    monkeypatch.setattr(BaseVideoProcessor, "resize", resize)
    return shapes


class Double:
    """As much of HF's ProcessorMixin as is called, and what it is called with."""

    video_token = "<video>"

    def __init__(self, tokenizer, size=16):
        self.tokenizer, self.size = tokenizer, size
        self.video_processor = DoubleVideoProcessor(size)
        self.apply_chat_template = tokenizer.apply_chat_template
        self.chat_template = TEMPLATE
        self.given = None

    def __call__(self, **given):
        self.given = given
        return {"input_ids": torch.ones(1, 3, dtype=torch.int64), "rows": [[0]]}

    def to_dict(self):
        return {"video_processor": {"size": self.size}}


@pytest.fixture
def double(tokenizer, hf_resize):
    return HFProcessor(Double(tokenizer))


def test_what_hf_is_called_with(double, clip, hf_resize):
    inputs = double(clip, "describe the video", num_frames=4)
    assert list(inputs) == ["input_ids"], "what is no tensor is no input of a model"
    given = double.hf.given
    assert given["text"] == ["<s> <video> describe the video assistant"]
    video = read_video(clip, num_frames=4)
    ((frames,),) = given["videos"]
    assert frames.equal(video.frames.permute(0, 3, 1, 2)[..., ::2, ::3])
    assert hf_resize == [(1, 1, 3, 48, 64)] * 4, "one frame at a time"
    assert given["do_resize"] is False
    ((metadata,),) = given["video_metadata"]
    assert metadata["total_num_frames"] == 16
    assert metadata["fps"] == pytest.approx(8) and metadata["duration"] == pytest.approx(2)
    assert [index / 8 for index in metadata["frames_indices"]] == pytest.approx(
        video.timestamps.tolist()
    )
    assert (metadata["height"], metadata["width"]) == (48, 64)
    assert given["do_sample_frames"] is False and given["return_tensors"] == "pt"


def test_several_prompts_about_one_video(double, clip, hf_resize):
    """The file is read once; HF's processor is asked for each."""
    several = double(clip, ["describe the video", "the video"], num_frames=4)
    assert len(hf_resize) == 4 and len(several) == 2
    for prompt, inputs in zip(["describe the video", "the video"], several, strict=True):
        assert inputs["input_ids"].equal(double(clip, prompt, num_frames=4)["input_ids"])


@pytest.mark.parametrize("prompt, added", [("describe", False), ("the <video> describe", True)])
def test_special_tokens_are_added_unless_the_prompt_begins_with_one(double, clip, prompt, added):
    double(clip, prompt, num_frames=4)
    assert double.hf.given["add_special_tokens"] is added


@pytest.mark.parametrize("sampling, frames", [({}, 4), ({"fps": 4.0}, 8), ({"num_frames": 6}, 6)])
def test_sampling(double, clip, sampling, frames):
    """Two seconds; by default two frames a second. Frames that were read stay as they are."""
    double(clip, "describe", **sampling)
    assert len(double.hf.given["videos"][0][0]) == frames
    video = read_video(clip, **(sampling or {"num_frames": 3}))
    assert isinstance(video, Video)
    double(video, "describe")
    assert len(double.hf.given["videos"][0][0]) == len(video.frames)


def test_frames_that_are_of_no_file_are_left_to_hf(double, clip, hf_resize):
    frames = torch.randint(0, 256, (6, 48, 64, 3), dtype=torch.uint8)
    video = read_video(clip, num_frames=4)
    listed = list(frames.numpy())
    for given, expected in ((frames, frames), (listed, frames), (video, video.frames)):
        double(given, "describe")
        ((passed,),) = double.hf.given["videos"]
        assert passed.equal(expected.permute(0, 3, 1, 2))
        assert "do_resize" not in double.hf.given
    assert not hf_resize
    double(frames.numpy(), "describe", fps=3.0)
    ((metadata,),) = double.hf.given["video_metadata"]
    assert metadata["fps"] == 3.0 and metadata["duration"] == 2.0
    assert metadata["frames_indices"] == list(range(6))


def test_a_processor_that_resizes_in_its_own_way_is_named(double, clip):
    double.hf.video_processor = OwnVideoProcessor()
    message = "^video processor: expected one .* got OwnVideoProcessor; .*read_video reads frames"
    with pytest.raises(ValueError, match=message):
        double(clip, "describe")
    double(read_video(clip), "describe")


def test_bad_arguments(double, clip):
    with pytest.raises(ValueError, match=r"^num_frames, fps: expected None for .* read before"):
        double(read_video(clip, num_frames=4), "describe", fps=1.0)
    with pytest.raises(ValueError, match="^prompt: expected the video placeholder <video> once"):
        double(clip, "<video> <video>", num_frames=4)


def test_device(double, clip):
    assert double(clip, "describe", device="meta")["input_ids"].device.type == "meta"


def test_families_whose_frames_are_cut_here_need_no_processor_of_hfs(
    random_pair_folders, tmp_path, monkeypatch, tokenizer
):
    def missing(*args, **kwargs):
        raise ImportError("\nX requires the Torchvision library.\nMuch advice.\n")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", missing)
    assert isinstance(load_processor(random_pair_folders[0], "target"), Processor)
    AutoConfig.for_model("llava_onevision").save_pretrained(tmp_path)
    message = rf"^{tmp_path}: expected what HF's .* torchvision\), got X requires .* library\.$"
    with pytest.raises(ImportError, match=message):
        load_processor(tmp_path, "target")
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *args, **kwargs: Double(tokenizer))
    processor = load_processor(tmp_path, "target")
    assert isinstance(processor, HFProcessor) and processor.tokenizer is tokenizer


def test_whose_inputs_the_draft_takes(random_pair_folders, tokenizer):
    """The target's, if both processors are of one kind and configured alike."""
    ours = Processor.from_pretrained(random_pair_folders[0])
    small, same, large = (HFProcessor(Double(tokenizer, size)) for size in (16, 16, 32))
    for draft, alike in ((same, True), (large, False), (ours, False)):
        assert prepare_alike((small, draft), random_pair_folders) == alike
        assert prepare_alike((draft, small), random_pair_folders) == alike
    assert prepare_alike((ours, ours), random_pair_folders)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="HF's processors need torchvision")
def test_the_real_one(tokenizer, clip, tmp_path, hf_greedy):
    """Saved, loaded, and what it returns is what the model and lvspec take."""
    from transformers import (
        AutoModelForImageTextToText,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    vision = {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4}
    config = AutoConfig.for_model(
        "llava_onevision",
        text_config={
            **sizes,
            "model_type": "qwen2",
            "hidden_size": 32,
            "num_key_value_heads": 1,
            "vocab_size": 40,
            "eos_token_id": None,
        },
        vision_config={**sizes, **vision, "hidden_size": 32, "vision_use_head": False},
        image_token_index=WORDS.index("<image>"),
        video_token_index=WORDS.index("<video>"),
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64).eval()
    model.generation_config.eos_token_id = None
    config.save_pretrained(tmp_path)
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessorPil(size=SQUARE),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    ).save_pretrained(tmp_path)
    inputs = load_processor(tmp_path, "target")(clip, "describe the video", num_frames=4)
    assert inputs["pixel_values_videos"].shape == (1, 4, 3, 16, 16)
    generation = generate(
        model,
        model,
        inputs,
        policy=AcceptancePolicy.strict(),
        config=DecodeConfig(gamma=3, max_new_tokens=8, eos_ids=()),
    )
    assert generation.tokens[0].tolist() == hf_greedy(model, inputs, 8)
