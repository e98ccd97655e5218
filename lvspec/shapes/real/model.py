"""The two models: Qwen2.5-VL's architecture around SmolLM2's text model, and its adapters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from lvspec.shapes.real.weights import IMAGE_PAD, VIDEO_END, VIDEO_PAD, VIDEO_START

HIDDEN, VOCABULARY, LAYERS = 576, 49152, 30
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def model_config(
    tokenizer: PreTrainedTokenizerBase, *, layers: int, vision_size: int, vision_depth: int
) -> Qwen2_5_VLConfig:
    """SmolLM2-135M's text model of `layers` layers behind a vision tower of the given size."""
    token = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 1536,
            "num_hidden_layers": layers,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100000.0,
                "mrope_section": [8, 12, 12],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_size,
            "intermediate_size": 2 * vision_size,
            "num_heads": vision_size // 32,
            "out_hidden_size": HIDDEN,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            # Every frame is one window, so patches stay in their order.
            "window_size": 336,
            "fullatt_block_indexes": list(range(vision_depth)),
        },
        image_token_id=token(IMAGE_PAD),
        video_token_id=token(VIDEO_PAD),
        vision_start_token_id=token(VIDEO_START),
        vision_end_token_id=token(VIDEO_END),
        tie_word_embeddings=True,
    )


def build_model(
    config: Qwen2_5_VLConfig, text: dict[str, Tensor], layers: tuple[int, ...]
) -> Qwen2_5_VLForConditionalGeneration:
    """A model whose text layers are the given ones of SmolLM2; the vision tower is random.

    Qwen2.5's biases of query, key and value, which Llama lacks, are 0.
    """
    model = Qwen2_5_VLForConditionalGeneration(config)
    state = {name: weight for name, weight in text.items() if not name.startswith("layers.")}
    for new, old in enumerate(layers):
        prefix = f"layers.{old}."
        state |= {
            f"layers.{new}.{name.removeprefix(prefix)}": weight
            for name, weight in text.items()
            if name.startswith(prefix)
        }
    language = model.model.language_model
    state |= {
        name: torch.zeros_like(parameter)
        for name, parameter in language.named_parameters()
        if name.endswith("proj.bias")
    }
    language.load_state_dict(state)
    model.tie_weights()
    return model


class LoRA(nn.Module):
    """A linear layer with a low-rank addition: `base(x) + scale * x a^T b^T`."""

    def __init__(self, base: nn.Linear, rank: int, scale: float = 2.0) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        # One product with the sum costs less than three and their sum, for thousands of rows.
        weight = self.base.weight + (self.scale * self.b @ self.a).to(self.base.weight.dtype)
        return functional.linear(x, weight, self.base.bias)


def _places(model: Qwen2_5_VLForConditionalGeneration, names: tuple[str, ...]):
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if name in names:
                    yield part, name, child


def add_lora(
    model: Qwen2_5_VLForConditionalGeneration, rank: int, names: tuple[str, ...]
) -> list[nn.Parameter]:
    """Freeze the text model and add adapters to its layers called `names`; returns these."""
    model.model.language_model.requires_grad_(False)
    added = []
    for part, name, child in _places(model, names):
        lora = LoRA(child, rank)
        setattr(part, name, lora)
        added += [lora.a, lora.b]
    return added


def adapter_state(model: Qwen2_5_VLForConditionalGeneration) -> dict[str, Tensor]:
    """All that was trained: the adapters and the vision tower."""
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if name.endswith((".a", ".b")) or ".visual." in name
    }


@torch.no_grad()
def fold_lora(
    model: Qwen2_5_VLForConditionalGeneration, adapters: dict[str, Tensor], scale: float = 2.0
) -> None:
    """Add trained adapters to the weights of a model without LoRA layers, and take over its tower.

    Raises:
        ValueError: an adapter that fits no layer.
    """
    parameters = dict(model.named_parameters())
    for name, value in adapters.items():
        if ".visual." in name:
            continue
        layer, part = name.rsplit(".", 1)
        if f"{layer}.weight" not in parameters:
            raise ValueError(f"adapters: expected names of the model's layers, got {name}")
        if part == "b":
            low = adapters[f"{layer}.a"].float()
            parameters[f"{layer}.weight"] += scale * value.float() @ low
    tower = {n.split(".visual.")[1]: v.float() for n, v in adapters.items() if ".visual." in n}
    model.model.visual.load_state_dict(tower)
