"""The families of Video-LLMs: one small table of what differs between them.

The only file with family names; CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """How one `model_type` differs from the others.

    Attributes:
        name: For messages.
        text_types: `model_type` of the text models that it may have. Their attention must be what
            `verify_attention` computes: no sinks, no soft cap.
        visual_inputs: Names of the inputs that hold pixels.
        placeholders: Fields of the config with the ids that image and video features replace.
        position_inputs: Names of the inputs that HF's `get_rope_index` takes, for families with
            rotary positions in time, height and width. Empty: positions count the tokens.
        text_attribute: Where the text model is in `model.model`.
        tower_attribute: Where the vision tower is, likewise: what is called with pixels.
        has_static_pass: Whether a pass of the text model does the same whatever the numbers are, so
            that a CUDA graph can hold it (no experts that are chosen in Python, for instance).
        patches_frames: Whether `lvspec.video.patches` makes its pixels, so that HF's processor is
            not needed.
    """

    name: str
    text_types: tuple[str, ...]
    visual_inputs: tuple[str, ...] = ("pixel_values", "pixel_values_videos")
    placeholders: tuple[str, ...] = ("image_token_id", "video_token_id")
    position_inputs: tuple[str, ...] = ()
    text_attribute: str = "language_model"
    tower_attribute: str = "vision_tower"
    has_static_pass: bool = True
    patches_frames: bool = False

    @property
    def position_rows(self) -> int:
        """Rotary positions of a token: time, height and width, or one."""
        return 3 if self.position_inputs else 1

    def text_model(self, model: PreTrainedModel) -> PreTrainedModel:
        return getattr(model.model, self.text_attribute)

    def tower(self, model: PreTrainedModel) -> PreTrainedModel:
        return getattr(model.model, self.tower_attribute)

    def visual_ids(self, model: PreTrainedModel) -> tuple[int, ...]:
        """Ids of the placeholders that image and video features replace."""
        return tuple(getattr(model.config, field) for field in self.placeholders)

    def prompt_positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Rotary positions of the prompt, int64 `[R, 1, T]`, those of HF's own `generate`."""
        ids = inputs["input_ids"]
        if not any(name in inputs for name in self.position_inputs if name.endswith("_grid_thw")):
            return torch.arange(ids.shape[1], device=ids.device).expand(self.position_rows, 1, -1)
        chosen = {name: inputs[name] for name in self.position_inputs if name in inputs}
        positions, _ = model.model.get_rope_index(ids, **chosen)
        return positions


_GRIDS = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw")

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        name="Qwen2-VL",
        text_types=("qwen2_vl_text",),
        tower_attribute="visual",
        position_inputs=_GRIDS,
        patches_frames=True,
    ),
    "qwen2_5_vl": Family(
        name="Qwen2.5-VL",
        text_types=("qwen2_5_vl_text",),
        tower_attribute="visual",
        position_inputs=(*_GRIDS, "second_per_grid_ts"),
        patches_frames=True,
    ),
    "qwen3_vl": Family(
        name="Qwen3-VL",
        text_types=("qwen3_vl_text",),
        tower_attribute="visual",
        position_inputs=_GRIDS,
    ),
    "qwen3_vl_moe": Family(
        name="Qwen3-VL-MoE",
        text_types=("qwen3_vl_moe_text",),
        tower_attribute="visual",
        position_inputs=_GRIDS,
        has_static_pass=False,
    ),
    "llava_onevision": Family(name="LLaVA-OneVision", text_types=("qwen2",)),
    "llava_next_video": Family(name="LLaVA-NeXT-Video", text_types=("llama", "mistral", "qwen2")),
    "internvl": Family(
        name="InternVL",
        text_types=("qwen2", "qwen3", "llama"),
        visual_inputs=("pixel_values",),
        placeholders=("image_token_id",),
    ),
    "smolvlm": Family(
        name="SmolVLM2",
        text_types=("llama",),
        visual_inputs=("pixel_values",),
        placeholders=("image_token_id",),
        text_attribute="text_model",
        tower_attribute="vision_model",
    ),
}


def check_family(model_type: str, role: str) -> Family:
    """The family of a `model_type`.

    Raises:
        ValueError: It is not supported; lists those that are.
    """
    if model_type not in FAMILIES:
        supported = ", ".join(f"{family.name} ({key})" for key, family in FAMILIES.items())
        raise ValueError(f"{role}: expected a model of {supported}, got model_type {model_type!r}")
    return FAMILIES[model_type]
