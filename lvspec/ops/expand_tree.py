"""expand_tree: the next level of a draft tree."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec import reference
from lvspec.kernels.workspace import expand_tree_bytes
from lvspec.ops.checks import (
    INT32,
    check,
    check_float,
    check_top_k,
    check_workspace,
    fail,
    statistics_dtype,
)
from lvspec.ops.registry import define
from lvspec.policy import MAX_TOP_K
from lvspec.reference import TreeLevel


def expand_tree(
    logits: Tensor,
    log_probs: Tensor,
    slots: Tensor,
    *,
    width: int,
    top_k: int | None = None,
    workspace: Tensor | None = None,
) -> TreeLevel:
    """The next level of a draft tree: `lvspec.reference.expand_tree`."""
    if logits.dim() != 3:
        fail("logits", "shape [B, W, V]", tuple(logits.shape))
    check_float("logits", logits)
    nodes, vocabulary = logits.shape[1:]
    if top_k is None:
        top_k = min(width, vocabulary, MAX_TOP_K)
    check_top_k(top_k, vocabulary)
    if not 1 <= width <= nodes * top_k:
        fail("width", f"1 to W * top_k = {nodes * top_k} nodes", width)
    statistics = (statistics_dtype(logits.dtype),)
    check("log_probs", log_probs, statistics, logits.shape[:2], logits.device)
    check("slots", slots, INT32, logits.shape[:2], logits.device)
    rows = logits.shape[0] * nodes
    check_workspace(workspace, logits.device, expand_tree_bytes(rows, vocabulary, top_k))
    operation = torch.ops.lvspec.expand_tree
    return TreeLevel(*operation(logits, log_probs, slots, width, top_k, workspace))


def _shapes(logits: Tensor, log_probs: Tensor, slots: Tensor, width: int) -> tuple[Tensor, ...]:
    shape = (logits.shape[0], width)
    return (
        slots.new_empty(shape, dtype=torch.int64),
        slots.new_empty(shape),
        log_probs.new_empty(shape),
    )


define("expand_tree", reference.expand_tree, _shapes, scratch=True)
