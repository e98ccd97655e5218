"""gate: the threshold of each sequence, in its rule."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec import reference
from lvspec.ops.checks import FLOAT32, INT32, STATISTICS, check, fail
from lvspec.ops.registry import define
from lvspec.rule import GATE_BINS, Rule
from lvspec.tree import MAX_SLOTS


def gate(relevance: Tensor, num_slots: Tensor, rule: Tensor, seen: Tensor) -> reference.Gate:
    """Put the threshold that separates a sequence's rows into its rule: `lvspec.reference.gate`."""
    if relevance.dim() != 2:
        fail("relevance", "shape [B, S]", tuple(relevance.shape))
    batch_size, slots = relevance.shape
    if not 1 <= slots <= MAX_SLOTS:
        fail("relevance", f"1 to {MAX_SLOTS} slots S", slots)
    device = relevance.device
    check("relevance", relevance, STATISTICS, (batch_size, slots), device)
    check("num_slots", num_slots, INT32, (batch_size,), device)
    check("rule", rule, FLOAT32, (batch_size, len(Rule._fields)), device)
    check("seen", seen, INT32, (batch_size, GATE_BINS), device)
    return reference.Gate(*torch.ops.lvspec.gate(relevance, num_slots, rule, seen))


def _shapes(rule: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    return rule.new_empty(rule.shape), seen.new_empty(seen.shape)


define("gate", reference.gate, _shapes)
