"""A pass of a text model over slots: HF's forward with explicit positions and a `SlotCache`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from transformers import Cache

from lvspec.models.attention import AttentionStep
from lvspec.models.cache import SlotCache
from lvspec.models.hf_names import CACHE


@dataclass
class StepOutput:
    """What one pass over the slots returns.

    Attributes:
        logits: `[B, S, V]`, the model's dtype.
        masses, peaks: float32 `[L, B, Hq, S]`, one entry for every layer; None without scores.
    """

    logits: Tensor
    masses: Tensor | None
    peaks: Tensor | None


def run_pass(
    text: nn.Module,
    head: nn.Module,
    tokens: Tensor,
    depths: Tensor,
    ancestors: Tensor,
    cache: SlotCache,
    scores: bool,
) -> tuple[Tensor, ...]:
    """Logits, and with `scores` masses and peaks of all layers."""
    batch_size, num_slots = tokens.shape
    index = (cache.kv_len[:, None] + depths).long()
    rows = cache.positions.shape[0]
    positions = cache.positions.gather(2, index.expand(rows, batch_size, num_slots))
    cache.begin_step(num_slots)
    step = AttentionStep(cache.kv_len, ancestors, cache.visual, scores, cache.plan, cache.workspace)
    logits = head(text_pass(text, tokens, positions, cache, step)).to(tokens.device)
    return (logits, torch.stack(step.masses), torch.stack(step.peaks)) if scores else (logits,)


def text_pass(
    text: nn.Module, tokens: Tensor, positions: Tensor, cache: Cache, step: AttentionStep
) -> Tensor:
    """The text model's own forward over slots, its attention being `step`'s: `[B, S, hidden]`.

    Args:
        text: Set to lvspec's attention.
        tokens: int64 `[B, S]`.
        positions: int64 `[R, B, S]`.
        cache: Takes the slots' keys and values, and returns those of the whole sequence.
        step: What attention needs, and where it leaves its scores.
    """
    return text(
        input_ids=tokens,
        position_ids=as_hf_takes_them(positions),
        attention_mask=_no_mask(tokens.device),
        use_cache=True,
        lvspec_step=step,
        **{CACHE: cache},
    ).last_hidden_state


class TextPass(nn.Module):
    """`run_pass` as a module whose arguments are tensors."""

    def __init__(self, text: nn.Module, head: nn.Module, scores: bool) -> None:
        super().__init__()
        self.text, self.head, self.scores = text, head, scores

    def forward(
        self,
        tokens: Tensor,
        depths: Tensor,
        ancestors: Tensor,
        k: Tensor,
        v: Tensor,
        kv_len: Tensor,
        visual: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, ...]:
        cache = SlotCache.over(k, v, kv_len, visual, positions)
        return run_pass(self.text, self.head, tokens, depths, ancestors, cache, self.scores)


def with_scores(
    output: tuple[Tensor, ...] | Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits, masses, peaks; a recorded pass returns a single result as it is."""
    if isinstance(output, Tensor):
        output = (output,)
    return (*output, None, None)[:3]


def example_like(tokens: Tensor, depths: Tensor, ancestors: Tensor, *cached: Tensor) -> tuple:
    """Arguments like these to record a pass with: an empty cache with room for its slots."""
    k, v, kv_len, visual, positions = cached
    slots = tokens.shape[1]
    room = max(slots, int(depths.max()) + 1)
    return (
        torch.zeros_like(tokens),
        depths.clone(),
        ancestors.clone(),
        torch.zeros_like(k[..., :room, :]),
        torch.zeros_like(v[..., :room, :]),
        torch.zeros_like(kv_len),
        torch.zeros_like(visual[:, :room]),
        torch.zeros_like(positions[..., :room]),
    )


def as_hf_takes_them(positions: Tensor) -> Tensor:
    """`[3, B, T]`, or `[B, T]` where a token has one position."""
    return positions if positions.shape[0] > 1 else positions[0]


@cache
def _no_mask(device: torch.device) -> Tensor:
    """HF's text models take a mask of four dimensions for a finished one and build none.

    What a slot sees is in the `AttentionStep`; this is never read.
    """
    with torch.inference_mode(False):
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
