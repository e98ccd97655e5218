"""logit_stats: best tokens, log-sum-exp and entropy of every row."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec import reference
from lvspec.kernels.workspace import logit_stats_bytes
from lvspec.ops.checks import check_float, check_top_k, check_workspace, fail, statistics_dtype
from lvspec.ops.registry import define
from lvspec.reference import LogitStats


def logit_stats(logits: Tensor, *, top_k: int = 4, workspace: Tensor | None = None) -> LogitStats:
    """Best tokens, log-sum-exp and entropy of every row: `lvspec.reference.logit_stats`."""
    if logits.dim() != 3:
        fail("logits", "shape [B, S, V]", tuple(logits.shape))
    check_float("logits", logits)
    check_top_k(top_k, logits.shape[2])
    rows = logits.shape[0] * logits.shape[1]
    check_workspace(workspace, logits.device, logit_stats_bytes(rows, logits.shape[2], top_k))
    return LogitStats(*torch.ops.lvspec.logit_stats(logits, top_k, workspace))


def _shapes(logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    rows, dtype = logits.shape[:2], statistics_dtype(logits.dtype)
    return (
        logits.new_empty((*rows, top_k), dtype=torch.int32),
        logits.new_empty((*rows, top_k), dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
    )


define("logit_stats", reference.logit_stats, _shapes, scratch=True)
