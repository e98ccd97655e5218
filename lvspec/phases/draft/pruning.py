"""Which of a prompt's video tokens the draft's cache keeps.

A video is thousands of tokens of which a caption needs few, and the draft reads all that its cache
holds at every pass. The rule is SpecVLM's: tokens that the *target* looks at from the end of the
prompt, until they have 40 % of that attention, and the rest of the share at even distances, so that
no part of the video is missing. Of a prompt that ends with a video all are at even distances.

The target's prefill is HF's own forward, which gives no attention weights. So the last few text
tokens pass through the target once more over the rows that it has already read: about the cost of
one verify pass, once a prompt.

Rows that are kept are as the whole prompt made them. One is not: a draft writes the first of the
last two committed tokens again, so the first draft writes the prompt's last row from what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lvspec.models.attention import AttentionStep, lvspec_attention_on
from lvspec.models.cache import SlotCache
from lvspec.models.model import Model
from lvspec.models.text_pass import hf_pass
from lvspec.tree import chain_ancestors

TOP_MASS = 0.4
"""Share of the attention on the video that the tokens kept for their attention make up."""

QUERY_ROWS = 16
"""Text tokens at the end of the prompt whose attention counts, at most."""


@dataclass(frozen=True)
class VideoPruning:
    """A share of the video tokens, and how they are chosen.

    Attributes:
        target: Whose attention says what matters.
        share: Of the prompt's video tokens, 0 to 1; rounded to a whole number of them.
        by: "attention" or "uniform".
    """

    target: Model
    share: float
    by: Literal["attention", "uniform"]

    def rows(
        self, visual: Tensor, sequence: int, *, prompt: Tensor, target_cache: SlotCache
    ) -> Tensor:
        """Rows of the prompt to keep, int64 `[n]`, ascending.

        Args:
            visual: bool `[T]`, where the draft's prompt has video tokens.
            sequence: Place of the prompt in the target's cache.
            prompt: int64 `[1, T]`, the target's prompt.
            target_cache: What the target has read.

        Raises:
            ValueError: The target's prompt has its video tokens elsewhere.
        """
        importance = None
        # Where no text is behind the video, nobody is there to be asked.
        is_asked = self.by == "attention" and 0 < self.share < 1 and not bool(visual[-1])
        if is_asked and bool(visual.any()):
            if not visual.equal(target_cache.visual[sequence, : visual.shape[0]] != 0):
                raise ValueError(
                    "draft_inputs: expected video tokens where the target's prompt has them, for "
                    'its attention says which of them to keep (draft_keep_by="attention"), got '
                    "them elsewhere"
                )
            importance = prompt_importance(self.target, prompt, target_cache, sequence)
        return rows_to_keep(visual, self.share, importance)


def prompt_importance(model: Model, prompt: Tensor, cache: SlotCache, sequence: int) -> Tensor:
    """Attention that the end of a prompt pays to each of its video tokens.

    Summed over layers, heads and the last text tokens behind the video, at most `QUERY_ROWS`.

    Args:
        model: Whose attention.
        prompt: int64 `[1, T]`, with at least one video token, and text behind the last of them: the
            row of a video token is made of a feature, and cannot be made again here.
        cache: Holds the prompt; nothing is written to it.
        sequence: In this place.

    Returns:
        float32 (float64 for a float64 model) `[T]`, 0 where there is no video token.
    """
    length, one = prompt.shape[1], slice(sequence, sequence + 1)
    visual = cache.visual[one]
    last_visual = int(visual[0, :length].nonzero()[-1])
    rows = min(length - 1 - last_visual, QUERY_ROWS)
    step = AttentionStep(
        cache.kv_len[one] - rows,
        chain_ancestors(rows, batch_size=1, device=prompt.device),
        visual,
        scores=False,
        scales=cache.scales(one),
        importance=torch.zeros(
            visual.shape,
            dtype=torch.float64 if cache.k.dtype == torch.float64 else torch.float32,
            device=prompt.device,
        ),
    )
    with model.held(), lvspec_attention_on(model.text):
        hf_pass(
            model.text,
            prompt[:, -rows:],
            cache.positions[:, one, length - rows : length],
            cache.reading_view(sequence),
            step,
        )
    return model.ranks.sum(step.importance)[0, :length]


def rows_to_keep(visual: Tensor, share: float, importance: Tensor | None = None) -> Tensor:
    """All text rows of a prompt and a share of its video rows.

    Worked example: of video rows with importance 5, 1, 3, 1 a share of 0.5 keeps the first, which
    has 40 % of the importance by itself, and the middle one of the other three.

    Args:
        visual: bool `[T]`.
        share: Of the video rows, 0 to 1; rounded to a whole number of them.
        importance: `[T]`, of which the most important rows are kept up to `TOP_MASS` of it; None
            keeps rows at even distances.

    Returns:
        int64 `[n]`, ascending. The last row is always among them: drafting goes on from there.
    """
    video = visual.nonzero()[:, 0]
    wanted = round(share * video.shape[0])
    is_kept = ~visual
    is_kept[-1] = True
    if importance is not None and wanted > 0:
        mass, order = importance[video].sort(descending=True, stable=True)
        reached = mass.cumsum(0)
        # The one that reaches the mass belongs to them.
        top = min(int((reached < TOP_MASS * reached[-1]).sum()) + 1, wanted)
        is_kept[video[order[:top]]] = True
        video, wanted = video[order[top:]].sort().values, wanted - top
    is_kept[video[_spread(video.shape[0], wanted, visual.device)]] = True
    return is_kept.nonzero()[:, 0]


def _spread(count: int, wanted: int, device: torch.device) -> Tensor:
    """`wanted` of the numbers below `count`, in the middle of as many equal parts."""
    return (2 * torch.arange(wanted, device=device) + 1) * count // (2 * max(wanted, 1))
