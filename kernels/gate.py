"""gate: the threshold that parts a sequence's rows, from a histogram of their relevance.

One program a sequence: `S` relevances, 64 counts in and out, one rule in and out. Sums are of
integers and every comparison is of the same float64 numbers, so the result has the specification's
bits. Specification: lvspec.reference.gate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.rule import (
    ANCHOR_REGRET,
    ANCHOR_THRESHOLD,
    BINS,
    COUNT,
    DISTANCE,
    GATE_ROWS,
    SHIFT_WINDOW,
)

_INFINITY = tl.constexpr(float("inf"))
# What is left of a float32's bits is its exponent and two of its mantissa; that of the lowest bin.
_SHIFT = tl.constexpr(21)
_FIRST = tl.constexpr((127 << 2) - BINS.value)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "relevance_stride_batch",
        "relevance_stride_slot",
        "num_slots_stride",
        "rule_stride_batch",
        "rule_stride_column",
        "seen_stride_batch",
        "seen_stride_bin",
    ]
)
def gate_kernel(
    relevance,
    num_slots,
    rule,
    seen,
    new_rule,
    new_seen,
    num_rows,
    relevance_stride_batch,
    relevance_stride_slot,
    num_slots_stride,
    rule_stride_batch,
    rule_stride_column,
    seen_stride_batch,
    seen_stride_bin,
    BLOCK_S: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    column = tl.arange(0, COLUMNS)
    rule += sequence * rule_stride_batch
    numbers = tl.load(rule + column * rule_stride_column, mask=column < COUNT, other=0.0)
    counts = tl.load(seen + sequence * seen_stride_batch + bins * seen_stride_bin)
    gate_rows = tl.load(rule + GATE_ROWS * rule_stride_column)
    if gate_rows > 0:
        slot = tl.arange(0, BLOCK_S)
        in_use = tl.load(num_slots + sequence * num_slots_stride)
        in_use = tl.minimum(tl.maximum(in_use, 1), num_rows)
        x = tl.load(
            relevance
            + sequence * relevance_stride_batch
            + slot.to(tl.int64) * relevance_stride_slot,
            mask=slot < in_use,
            other=float("nan"),
        ).to(tl.float32)
        index = (x.to(tl.int32, bitcast=True) >> _SHIFT) - _FIRST
        # A negative number has its sign in front: the lowest bin. A NaN has none.
        index = tl.where(x > 0, tl.minimum(tl.maximum(index, 0), BINS - 1), 0)
        index = tl.where(x == x, index, -1)
        counts += tl.sum((index[:, None] == bins[None, :]).to(tl.int32), axis=0)

        rows = counts.to(tl.int64)
        n = tl.sum(rows, axis=0)
        s = tl.sum(rows * bins, axis=0)
        n0 = tl.cumsum(rows, axis=0)
        s0 = tl.cumsum(rows * bins, axis=0)
        n1 = n - n0
        apart = (s - s0) * n0 - s0 * n1
        is_cut = (n0 > 0) & (n1 > 0)
        squared = apart.to(tl.float64) * apart.to(tl.float64)
        between = squared / tl.maximum(n0 * n1, 1).to(tl.float64)
        between = tl.where(is_cut, between, -1.0)
        is_best = is_cut & (between == tl.max(between, axis=0))
        cut = tl.min(tl.where(is_best, bins, BINS), axis=0)
        is_apart = is_cut & (bins == cut) & (apart >= n0 * n1 * DISTANCE)
        found = (tl.sum(is_apart.to(tl.int32), axis=0) > 0) & (n.to(tl.float64) >= gate_rows)

        threshold = ((cut + 1 + _FIRST) << _SHIFT).to(tl.float32, bitcast=True)
        threshold = tl.where(found, threshold, -_INFINITY)
        numbers = tl.where(column == ANCHOR_THRESHOLD, threshold, numbers)
        numbers = tl.where(~found & (column == ANCHOR_REGRET), -_INFINITY, numbers)
        numbers = tl.where(~found & (column == SHIFT_WINDOW), 0.0, numbers)
    tl.store(new_rule + sequence * COUNT + column, numbers, mask=column < COUNT)
    tl.store(new_seen + sequence * BINS + bins, counts)


_LAUNCH = {"num_warps": 4, "num_stages": 1}


def gate(
    relevance: torch.Tensor, num_slots: torch.Tensor, rule: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rule, seen); see `lvspec.reference.gate`."""
    batch_size, num_rows = relevance.shape
    new_rule, new_seen = rule.new_empty(rule.shape), seen.new_empty(seen.shape)
    if not batch_size:
        return new_rule, new_seen
    with launch.device_guard(relevance):
        gate_kernel[(batch_size,)](
            relevance=relevance,
            num_slots=num_slots,
            rule=rule,
            seen=seen,
            new_rule=new_rule,
            new_seen=new_seen,
            num_rows=num_rows,
            relevance_stride_batch=relevance.stride(0),
            relevance_stride_slot=relevance.stride(1),
            num_slots_stride=num_slots.stride(0),
            rule_stride_batch=rule.stride(0),
            rule_stride_column=rule.stride(1),
            seen_stride_batch=seen.stride(0),
            seen_stride_bin=seen.stride(1),
            BLOCK_S=32 if num_rows <= 32 else 64,
            COLUMNS=triton.next_power_of_2(COUNT.value),
            **_LAUNCH,
        )
    return new_rule, new_seen
