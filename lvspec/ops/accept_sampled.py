"""accept_sampled: which draft tokens stand where the target samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvspec import reference
from lvspec.kernels.workspace import accept_sampled_bytes
from lvspec.ops.accept import acceptance_shapes
from lvspec.ops.backends import float_dtypes
from lvspec.ops.checks import (
    INT32,
    INT64,
    check,
    check_float,
    check_workspace,
    fail,
    statistics_dtype,
)
from lvspec.ops.registry import define
from lvspec.reference import Acceptance
from lvspec.tree import MAX_SLOTS


def accept_sampled(
    logits: Tensor,
    draft_logits: Tensor | None,
    tokens: Tensor,
    num_slots: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    workspace: Tensor | None = None,
) -> Acceptance:
    """Which draft tokens stand where the target samples: `lvspec.reference.accept_sampled`."""
    if logits.dim() != 3:
        fail("logits", "shape [B, S, V]", tuple(logits.shape))
    check_float("logits", logits)
    device = logits.device
    batch_size, slots, vocabulary = logits.shape
    if not 1 <= slots <= MAX_SLOTS:
        fail("logits", f"1 to {MAX_SLOTS} slots S", slots)
    if vocabulary < 1:
        fail("logits", "a vocabulary V of at least 1", vocabulary)
    draft_vocabulary = 0
    if draft_logits is not None:
        if draft_logits.dim() != 3:
            fail("draft_logits", "shape [B, S - 1, Vd]", tuple(draft_logits.shape))
        draft_vocabulary = draft_logits.shape[2]
        shape = (batch_size, slots - 1, draft_vocabulary)
        check("draft_logits", draft_logits, float_dtypes(device.type), shape, device)
        if draft_vocabulary < 1:
            fail("draft_logits", "a vocabulary Vd of at least 1", draft_vocabulary)
    check("tokens", tokens, INT64, (batch_size, slots), device)
    check("num_slots", num_slots, INT32, (batch_size,), device)
    check("uniforms", uniforms, (torch.float32,), (batch_size, slots), device)
    if not 0 < temperature < math.inf:
        fail("temperature", "a finite number > 0", temperature)
    needed = accept_sampled_bytes(batch_size, slots, vocabulary, draft_vocabulary)
    check_workspace(workspace, device, needed)
    operation = torch.ops.lvspec.accept_sampled
    return Acceptance(
        *operation(logits, draft_logits, tokens, num_slots, uniforms, temperature, workspace)
    )


def _shapes(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    return acceptance_shapes(tokens, statistics_dtype(logits.dtype))


define("accept_sampled", reference.accept_sampled, _shapes, scratch=True)
