"""The real-language pair: weights and tokenizer out of a GGUF, prompts and features of clips."""

import random

import pytest
import torch
from real_models import (
    SCENE,
    drawn,
    needs_gguf,
    tiny_llama,
    write_gguf,
)
from transformers import PreTrainedTokenizerFast

from lvspec.shapes.real import (
    captions,
    clips,
    data,
    scenes,
    weights,
)

pytest.importorskip("gguf", reason="needs gguf (lvspec[real])")


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def gguf_file(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, llama)
    return path


@pytest.fixture(scope="module")
def tokenizer(gguf_file):
    return weights.read_tokenizer(gguf_file)


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
