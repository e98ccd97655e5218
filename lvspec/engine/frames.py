"""Where in its video a target looks while it says a caption: attention for each token and frame.

The loop keeps one number a row, its relevance. Which frames were looked at is asked afterwards, by
one more pass over prompt and caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lvspec.models.attention import AttentionStep, lvspec_attention_on
from lvspec.models.holding import held
from lvspec.models.inputs import check_inputs
from lvspec.models.model import Model
from lvspec.models.text_pass import hf_pass
from lvspec.tree import chain_ancestors

ROWS = 16
"""Of a pass."""


@dataclass(frozen=True)
class FrameAttention:
    """Attention of the rows that predicted a caption, on the groups of frames that make tokens.

    Attributes:
        mass: float32 (float64 for a float64 model) `[n, G]`: of the row that predicted a token the
            share of its attention on a group of frames, averaged over layers and heads. A row sums
            to its attention on the whole video. A first token behind a prompt that ends with the
            video has NaN: its row was made of a feature and cannot be made again.
        frames: How many sampled frames there are, G groups of them, of equal size but for the last.
    """

    mass: Tensor
    frames: int

    def to_dict(self, timestamps: Sequence[float]) -> dict[str, Any]:
        """Plain values for JSON.

        Args:
            timestamps: Seconds of every sampled frame.

        Returns:
            `timestamps`, of the first frame of each group, and `mass`, a list for each token, with
            null where there is none.

        Raises:
            ValueError: There are other than `frames` timestamps.
        """
        if len(timestamps) != self.frames:
            raise ValueError(
                f"timestamps: expected one for each of {self.frames} frames, got {len(timestamps)}"
            )
        groups = self.mass.shape[1]
        step = -(-self.frames // groups)
        return {
            "timestamps": [round(float(timestamps[i * step]), 3) for i in range(groups)],
            "mass": [
                [None if value != value else float(f"{value:.4g}") for value in row]
                for row in self.mass.tolist()
            ],
        }


@torch.inference_mode(False)
@torch.no_grad()
def frame_attention(
    target: PreTrainedModel, inputs: Mapping[str, Any], tokens: Sequence[int], *, frames: int
) -> FrameAttention:
    """Which frames the target looked at when it said `tokens`.

    The prompt is read once more, and the caption behind it in passes of `ROWS` rows: the tokens
    that were accepted loosely are given, as they were in the loop.

    Args:
        target: The HF model.
        inputs: What its processor returns for the prompt, with one video.
        tokens: The caption, int `[n]`, n >= 1.
        frames: How many frames were sampled.

    Raises:
        TypeError, ValueError: As `lvspec.generate`; or the prompt's video tokens cannot be divided
            among the frames, and the message says why.
    """
    model = Model(target, "target", fuse="none")
    found = check_inputs(model, inputs)
    prompt = found["input_ids"]
    length = prompt.shape[1]
    visual = torch.isin(prompt[0], torch.tensor(model.visual_ids, device=prompt.device))
    groups = _groups(visual, found, frames)
    cache = model.new_cache(batch_size=1, capacity=length + len(tokens), num_slots=ROWS)
    with held([model]):
        model.prefill(found, cache, 0, following=len(tokens))
        given = torch.tensor([tokens], device=prompt.device)
        rows = torch.cat([prompt[:, -1:], given[:, :-1]], dim=1)
        first = 1 if bool(visual[-1]) else 0
        cache.kv_len.fill_(length - 1 + first)
        importance = [groups.new_full((first, length), torch.nan, dtype=_dtype(cache.k))]
        with lvspec_attention_on(model.text):
            for start in range(first, len(tokens), ROWS):
                part = rows[:, start : start + ROWS]
                importance.append(_pass(model, cache, part)[:, :length])
                cache.kv_len += part.shape[1]
    heads = model.text.config.num_attention_heads * model.text.config.num_hidden_layers
    by_position = torch.cat(importance)[:, visual].cpu() / heads
    mass = by_position.new_zeros(len(tokens), int(groups.max()) + 1)
    return FrameAttention(mass.index_add_(1, groups.cpu(), by_position), frames)


def _pass(model: Model, cache: Any, tokens: Tensor) -> Tensor:
    """What each row of `tokens` `[1, S]` looks at, summed over layers and heads: `[S, N]`."""
    count, capacity = tokens.shape[1], cache.capacity
    begin = int(cache.kv_len[0])
    cache.begin_step(count)
    step = AttentionStep(
        cache.kv_len,
        chain_ancestors(count, batch_size=1, device=tokens.device),
        cache.visual,
        scores=False,
        importance=torch.zeros(
            (1, count, capacity), dtype=_dtype(cache.k), device=cache.visual.device
        ),
    )
    hf_pass(model.text, tokens, cache.positions[:, :, begin : begin + count], cache, step)
    return model.ranks.sum(step.importance)[0]


def _dtype(keys: Tensor) -> torch.dtype:
    return torch.float64 if keys.dtype == torch.float64 else torch.float32


def _groups(visual: Tensor, inputs: Mapping[str, Any], frames: int) -> Tensor:
    """int64 `[V]`: of every video token the group of frames that it was made of."""
    count = int(visual.sum())
    if not count:
        raise ValueError("inputs: expected a prompt with a video, got one without video tokens")
    grids = [inputs[name] for name in ("video_grid_thw", "image_grid_thw") if name in inputs]
    grids = [grid for grid in grids if len(grid)]
    kinds = inputs["input_ids"][0][visual].unique()
    if len(kinds) > 1 or sum(map(len, grids)) > 1:
        raise ValueError("inputs: expected one video in the prompt, got several or pictures")
    if grids:
        groups = int(grids[0][0, 0])
    else:
        # Families that write something between frames, or nothing, and perhaps an end mark behind.
        groups = frames
    if groups > frames or count < groups or count % groups > 1:
        raise ValueError(
            f"inputs: expected as many video tokens for each of {groups} groups of {frames} "
            f"frames, got {count} tokens"
        )
    size = count // groups
    return (torch.arange(count, device=visual.device) // size).clamp(max=groups - 1)
