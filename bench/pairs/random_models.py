"""Models of real shapes with random weights, and prompts that are read without being read.

What a pass costs depends on shapes, not on values: HF's own classes are built from their configs
with random weights on the device, the vision tower at its smallest, for it is not run. A prompt's
keys and values are random too, so that a context of any length is there at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ops.cases import Shape
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from lvspec.models.cache import Beginning, SlotCache
from lvspec.models.model import Model

SYSTEM, QUESTION = 15, 40
"""Text tokens before and behind the video of a prompt, as in one clip's prompt of these models."""
FIRST_WORD = 8
"""Ids from here on are words; those before are placeholders and the like."""


def build(
    shape: Shape, device: torch.device, dtype: torch.dtype, *, tied: bool | None = None
) -> PreTrainedModel:
    """HF's model of this shape with random weights.

    Args:
        shape: What its config says.
        device: Where the weights are made; "meta" makes none.
        dtype: Of the weights.
        tied: In place of the shape's.
    """
    tied = shape.tied if tied is None else tied
    make = _llava if shape.family == "llava_onevision" else _qwen
    torch.manual_seed(sum(map(ord, shape.name)))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make(shape, tied).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _text_config(shape: Shape, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "layer_types": ["full_attention"] * shape.num_layers,
        "num_attention_heads": shape.num_q_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": 131072,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }


def _qwen(shape: Shape, tied: bool) -> PreTrainedModel:
    text = _text_config(shape, tied)
    eighth = shape.head_dim // 16
    text["rope_parameters"]["mrope_section"] = [2 * eighth, 3 * eighth, 3 * eighth]
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": shape.hidden_size,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=3,
        video_token_id=4,
        tie_word_embeddings=tied,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _llava(shape: Shape, tied: bool) -> PreTrainedModel:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_text_config(shape, tied)},
        vision_config=vision,
        image_token_index=3,
        video_token_index=4,
        tie_word_embeddings=tied,
    )
    return LlavaOnevisionForConditionalGeneration(config)


class RandomPromptModel(Model):
    """A model whose prompts are random keys and values, the same for the same ids.

    Everything else is `lvspec.models.model.Model`: engines and drafters cannot tell the difference.
    """

    def prefill(
        self,
        inputs: Mapping[str, Any],
        cache: SlotCache,
        sequence: int,
        *,
        following: int = 0,
        beginning: Beginning | None = None,
    ) -> Tensor:
        """Fill the slot; the prompt is one long video between two texts."""
        ids = inputs["input_ids"]
        length = ids.shape[1]
        generator = torch.Generator(self.device).manual_seed(int(ids[0, 0]))
        for rows in (cache.k, cache.v):
            # Layer by layer: what is drawn at once is a tensor beside the cache.
            for layer in rows[:, sequence, :, :length]:
                layer.copy_(
                    torch.randn(
                        layer.shape, generator=generator, dtype=layer.dtype, device=layer.device
                    )
                )
        visual = torch.zeros(length, dtype=torch.bool, device=self.device)
        visual[SYSTEM : length - QUESTION] = True
        rows = cache.positions.shape[0]
        positions = torch.arange(length, device=self.device).expand(rows, -1)
        cache.finish_prefill(sequence, positions, visual)
        logits = torch.zeros(1, self.vocab_size, dtype=self.text.dtype, device=self.device)
        logits[0, FIRST_WORD] = 1
        return logits


def random_prompt(length: int, vocabulary: int, device: torch.device, *, seed: int) -> Tensor:
    """int64 `[1, T]`: words, the first of which says which prompt it is.

    Raises:
        ValueError: There is no room for a video between its texts.
    """
    if length < SYSTEM + QUESTION + 1:
        raise ValueError(f"context: expected at least {SYSTEM + QUESTION + 1} tokens, got {length}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_WORD, vocabulary, (1, length), generator=generator)
    ids[0, 0] = FIRST_WORD + seed
    return ids.to(device)
