"""Architectures of the embedded target and draft: Qwen2.5-VL's, small.

The target is deep and narrow because on a CPU the time of a small decoding step is a fixed cost
per layer: many layers give the pair the draft-to-target cost ratio of real pairs, about 0.1.
"""

from __future__ import annotations

from transformers import Qwen2_5_VLConfig

from lvspec.shapes.tokenizer import SPECIAL_TOKENS

# The tokenizer's 186, padded. The same for both: HF's assisted generation, a peer in every table,
# takes models whose padding differs for models with different tokenizers.
VOCAB_SIZE = 256


def small_config(
    *,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate_size: int,
    vision_size: int,
    vision_depth: int,
    patch_size: int = 14,
) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of these sizes, with the special tokens of `tokenizer.SPECIAL_TOKENS`.

    The head size `hidden_size // heads` is a multiple of 16.
    """
    quarter = hidden_size // heads // 8  # of the rotary pairs, a half of the head
    token = {name: index for index, name in enumerate(SPECIAL_TOKENS)}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [quarter, 3 * quarter // 2, 3 * quarter // 2],
            },
            "bos_token_id": None,
            "eos_token_id": token["<|im_end|>"],
            "pad_token_id": token["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_size,
            "intermediate_size": 2 * vision_size,
            "num_heads": vision_size // 32,
            "out_hidden_size": hidden_size,
            "patch_size": patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(range(vision_depth)),
        },
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def target_config() -> Qwen2_5_VLConfig:
    return small_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        layers=12,
        heads=4,
        kv_heads=2,
        intermediate_size=512,
        vision_size=128,
        vision_depth=2,
    )


def draft_config() -> Qwen2_5_VLConfig:
    return small_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        layers=2,
        heads=4,
        kv_heads=2,
        intermediate_size=512,
        vision_size=64,
        vision_depth=1,
    )
