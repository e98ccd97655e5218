"""The attention implementation "lvspec" of transformers: verify_attention over a SlotCache.

Registered with both the attention and the mask interface. A forward that carries an
`AttentionStep` in the keyword `lvspec_step` computes `lvspec.ops.verify_attention` and leaves its
scores there; any other forward of a model that is set to "lvspec" is SDPA with SDPA's mask, so a
model left in this state still computes what it should.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lvspec import ops

NAME = "lvspec"


@dataclass
class AttentionStep:
    """One pass of slots: what its attention layers need, and the scores they leave.

    Attributes:
        kv_len: int32 `[B]`.
        ancestors: int64 `[B, S]`.
        visual: uint8 `[B, N]`.
        scores: Whether to compute mass and peak.
        plan: The split plan of the cache, or None.
        workspace: Scratch for the operation, or None.
        importance: `[B, N]`, to which every layer adds what `ops.visual_importance` says of the
            pass's rows together, or `[B, S, N]`, of each by itself; None where that is not wanted.
        masses, peaks: float32 `[B, Hq, S]` of every layer in order, if `scores`.
    """

    kv_len: Tensor
    ancestors: Tensor
    visual: Tensor
    scores: bool
    plan: ops.SplitPlan | None = None
    workspace: Tensor | None = None
    importance: Tensor | None = None
    masses: list[Tensor] = field(default_factory=list)
    peaks: list[Tensor] = field(default_factory=list)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention `[B, Hq, S, D]` of one layer's queries over its cache `[B, Hkv, N, D]`."""
        result = ops.verify_attention(
            query,
            key,
            value,
            self.kv_len,
            self.ancestors,
            self.visual,
            scale=scaling,
            plan=self.plan,
            scores=self.scores,
            workspace=self.workspace,
        )
        if self.scores:
            self.masses.append(result.visual_mass)
            self.peaks.append(result.visual_peak)
        if self.importance is not None:
            self.importance += _importance(self, query, key, result.lse, scaling)
        return result.out


def lvspec_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    lvspec_step: AttentionStep | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of one layer, `[B, S, Hq, D]`; the signature is that of `AttentionInterface`."""
    if lvspec_step is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    device = query.device
    query = query.to(key.device)  # the cache's, of which there is one for all layers
    return lvspec_step.attend(query, key, value, scaling).transpose(1, 2).to(device), None


def _importance(
    step: AttentionStep, query: Tensor, key: Tensor, lse: Tensor, scaling: float | None
) -> Tensor:
    """What the pass's rows look at, in the shape of `step.importance`."""
    length, visual = step.kv_len + query.shape[2], step.visual
    if step.importance.dim() == 2:
        return ops.visual_importance(query, key, length, visual, lse, scale=scaling)
    rows = range(query.shape[2])
    found = [
        ops.visual_importance(
            query[:, :, row : row + 1],
            key,
            length,
            visual,
            lse[:, :, row : row + 1].contiguous(),
            scale=scaling,
        )
        for row in rows
    ]
    return torch.stack(found, dim=1)


AttentionInterface.register(NAME, lvspec_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def lvspec_attention_on(text_model: PreTrainedModel) -> Iterator[None]:
    """Set a text model to "lvspec" and back to what it was; the vision tower is left alone."""
    config = text_model.config
    before = config._attn_implementation
    try:
        text_model.set_attn_implementation(NAME)
        yield
    finally:
        config._attn_implementation = before  # it was good before, so nothing is to be checked
