"""Whether a pair of models and the inputs of a prompt are what the loop can work with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lvspec.models.model import MADE_HERE, Model

# Inputs that say where tokens are in a video. Families that do not ask may be given them: a
# processor, or a draft of another family, may.
_POSITION_HINTS = ("mm_token_type_ids", "second_per_grid_ts")


def check_pair(target: Model, draft: Model) -> None:
    """Refuse a draft that cannot stand beside the target.

    Raises:
        ValueError: The devices or the ids of the visual placeholders differ.
    """
    if target.device != draft.device:
        raise ValueError(f"draft: expected a model on {target.device}, got {draft.device}")
    if target.visual_ids != draft.visual_ids:
        raise ValueError(
            f"draft: expected the target's image and video token ids {target.visual_ids}, got "
            f"{draft.visual_ids}"
        )


def check_inputs(model: Model, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of one sequence, ready for `Model.prefill`, without padding.

    Raises:
        TypeError: `inputs` is no mapping.
        ValueError: `input_ids` are missing or not of one sequence, the mask does not fit them, a
            tensor is on another device than the model, placeholders and pixels do not go
            together, the model does not take an input, or there are positions, embeddings or a
            cache, which are made here.
    """
    name = f"{model.role} inputs"
    if not hasattr(inputs, "keys"):
        raise TypeError(f"{name}: expected a mapping of tensors, got {type(inputs).__name__}")
    found = {key: inputs[key] for key in inputs.keys() if inputs[key] is not None}
    ids = found.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        raise ValueError(
            f"{name}: expected input_ids of shape (1, T) with T >= 1, got {_shape_of(ids)}"
        )
    for key, value in found.items():
        if isinstance(value, Tensor) and value.device != model.device:
            raise ValueError(
                f"{name}: expected {key} on the {model.role}'s device {model.device}, got "
                f"{value.device}"
            )
    for key in MADE_HERE:
        if key in found:
            raise ValueError(f"{name}: expected no {key}, which lvspec makes itself, got one")
    mask = found.pop("attention_mask", None)
    for key in found.keys() - model.input_names:
        if key not in _POSITION_HINTS:
            raise ValueError(f"{name}: expected inputs that {model.family.name} takes, got {key!r}")
        del found[key]
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        raise ValueError(
            f"{name}: expected an attention_mask of shape {tuple(ids.shape)} like input_ids, got "
            f"{_shape_of(mask)}"
        )
    if mask is not None and not bool(mask.all()):
        kept = mask[0].bool()
        if not bool(kept.any()):
            raise ValueError(
                f"{name}: expected an attention_mask that keeps at least one token, got one of 0"
            )
        for key in ("input_ids", "mm_token_type_ids"):
            if key in found:
                found[key] = found[key][:, kept]
        ids = found["input_ids"]
    has_pixels = any(key in found for key in model.family.visual_inputs)
    visual = torch.isin(ids, torch.tensor(model.visual_ids, device=ids.device))
    if has_pixels and not bool(visual.any()):
        raise ValueError(
            f"{name}: expected a video placeholder in the prompt (one of the token ids "
            f"{model.visual_ids}) because there are pixels, got none"
        )
    if not has_pixels and bool(visual.any()):
        raise ValueError(
            f"{name}: expected {' or '.join(model.family.visual_inputs)} because the prompt has "
            "video placeholders, got neither"
        )
    takes_kinds = "mm_token_type_ids" in model.family.position_inputs
    if has_pixels and takes_kinds and "mm_token_type_ids" not in found:
        # Without them HF falls back to one-dimensional positions and says nothing.
        kinds = torch.zeros_like(ids)
        for kind, token in enumerate(model.visual_ids, start=1):
            kinds[ids == token] = kind
        found["mm_token_type_ids"] = kinds
    return found


def _shape_of(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
