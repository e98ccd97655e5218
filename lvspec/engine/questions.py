"""Several prompts about one clip: what they share is read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lvspec.engine.sequence import Shared
from lvspec.models.model import Model

_OF_A_PROMPT = ("input_ids", "attention_mask", "mm_token_type_ids")
"""Inputs that have a number for each token; others are the clip's."""


def about(
    inputs: Mapping[str, Any], prompts: Sequence[Tensor], name: str = "inputs"
) -> list[dict[str, Any]]:
    """The inputs of each prompt, of those of one and the ids of all.

    Args:
        inputs: What a processor returns for a clip and any prompt.
        prompts: int64 `[1, T]` each.
        name: Of `inputs`, for messages.

    Raises:
        TypeError: One of these is something else.
    """
    if not hasattr(inputs, "keys"):
        raise TypeError(f"{name}: expected those of one prompt, got {type(inputs).__name__}")
    for prompt in prompts:
        if not isinstance(prompt, Tensor):
            raise TypeError(
                f"prompts: expected tensors of token ids, got {type(prompt).__name__} (a processor "
                "makes them: processor(video, [prompt, ...]))"
            )
    clip = {key: inputs[key] for key in inputs.keys() if key not in _OF_A_PROMPT}
    return [{**clip, "input_ids": prompt} for prompt in prompts]


def shared_by(model: Model, prompts: Sequence[Tensor]) -> Shared | None:
    """What prompts about one clip begin with; None for one prompt alone.

    Args:
        model: Its placeholders say where the clip is.
        prompts: int64 `[1, T]` each, those of one clip.

    Raises:
        ValueError: They differ before the clip ends: it would not be the same to all of them.
    """
    if len(prompts) < 2:
        return None
    length = min(prompt.shape[1] for prompt in prompts) - 1
    first = prompts[0][0, :length]
    for prompt in prompts[1:]:
        differs = (prompt[0, :length] != first[:length]).nonzero()
        length = length if differs.numel() == 0 else min(length, int(differs[0]))
    placeholders = torch.tensor(model.visual_ids, device=prompts[0].device)
    for prompt in prompts:
        if bool(torch.isin(prompt[0, length:], placeholders).any()):
            raise ValueError(
                "prompts: expected ones that are the same up to the end of the clip, with words "
                f"behind it, got ones that differ from token {length} on"
            )
    return Shared(length) if length > 0 else None
