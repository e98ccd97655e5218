"""gate: which rows look at the video, found in the rows of each sequence itself."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lvspec.rule import GATE_BINS, GATE_DISTANCE, Rule

OCTAVE_BINS = 4
"""Bins between a number and its double, of equal width between them."""

_SHIFT = 21  # leaves exponent and two bits of the mantissa of a float32
_FIRST = (127 << 2) - GATE_BINS  # of the lowest bin: the bits of 2**-16


class Gate(NamedTuple):
    """What `gate` returns."""

    rule: torch.Tensor  # float32 [B, K]
    seen: torch.Tensor  # int32 [B, 64]


def gate(
    relevance: torch.Tensor, num_slots: torch.Tensor, rule: torch.Tensor, seen: torch.Tensor
) -> Gate:
    """Put the threshold that separates the rows seen so far into the rule of each sequence.

    A mean of attention has a scale of its own in every model, so no number tells rows that look at
    the video from rows that do not. But there are two kinds of rows, and where their logarithms
    part is Otsu's threshold: that which leaves the least variance within the two. It is found in a
    histogram of few integers, so it is the same on every backend, and in every batch.

    Per sequence whose rule has `gate_rows > 0`; the others are returned as they are.

    - The bin of a relevance x (rounded to float32), with `bits(x)` the integer of its bits:
      `(bits(x) >> 21) - 444` brought into 0..63, four bins an octave from 2**-16 to 1; 0 for what
      is not above 0. A NaN has none.
    - `seen` is counted up by the rows 0..`num_slots - 1` (`num_slots` brought into 1..S). Whether
      what stands there is accepted does not matter: a draft that goes astray is looked at alike.
    - For each cut k in 0..62, with `n0` rows in bins 0..k and `n1` behind them, `s0` and `s1` the
      sums of their bins' numbers: `(s0 n1 - s1 n0)^2 / (n0 n1)` in float64, the integers in front
      of the division exact; where n0 or n1 is 0 it is 0. The cut is the one with the largest, of
      equals the lowest.
    - It is *found* if there are at least `gate_rows` rows and the two means, `s1 / n1` and `s0 /
      n0`, are at least 4 apart: one octave. `s1 n0 - s0 n1 >= 4 n0 n1`.
    - Found, `anchor_threshold` becomes the lower end of bin k + 1. Not found, nothing but exact
      matches is accepted: `anchor_threshold` and `anchor_regret` become -inf, `shift_window` 0.

    Example: relevances 1/64 (bin 40) six times and 1/4 (bin 56) twice. Every cut from 40 to 55
    parts them, the lowest counts: the threshold is the lower end of bin 41, 5/256.

    Args:
        relevance: float32 or float64 `[B, S]`, of every row.
        num_slots: int32 `[B]`.
        rule: float32 `[B, K]`, in every row the numbers of a `lvspec.rule.Rule`.
        seen: int32 `[B, 64]`, rows of earlier calls.

    Returns:
        Gate; its `seen` is for the next call.
    """
    counts = seen + _histogram(relevance, num_slots)
    bins = torch.arange(GATE_BINS, device=seen.device)
    below, moments = counts.long().cumsum(1), (counts * bins).long().cumsum(1)
    n0, s0 = below[:, :-1], moments[:, :-1]
    n1, s1 = below[:, -1:] - n0, moments[:, -1:] - s0
    apart = s1 * n0 - s0 * n1
    between = apart.double() ** 2 / (n0 * n1).clamp(min=1).double()
    cut = between.masked_fill((n0 == 0) | (n1 == 0), 0).argmax(1, keepdim=True)

    number = Rule(*rule.unbind(1))
    found = apart.gather(1, cut) >= GATE_DISTANCE * n0.gather(1, cut) * n1.gather(1, cut)
    found &= (n0.gather(1, cut) > 0) & (n1.gather(1, cut) > 0)
    found = found[:, 0] & (below[:, -1] >= number.gate_rows)
    threshold = ((cut[:, 0] + 1 + _FIRST) << _SHIFT).int().view(torch.float32)

    found_rule = number._replace(anchor_threshold=threshold)
    minus = torch.full_like(threshold, -torch.inf)
    strict = number._replace(
        anchor_threshold=minus, anchor_regret=minus, shift_window=torch.zeros_like(threshold)
    )
    is_gated = number.gate_rows > 0
    found_rule, strict = (torch.stack(list(x), dim=1) for x in (found_rule, strict))
    adjusted = torch.where(found[:, None], found_rule, strict)
    return Gate(
        torch.where(is_gated[:, None], adjusted, rule),
        torch.where(is_gated[:, None], counts, seen),
    )


def _histogram(relevance: torch.Tensor, num_slots: torch.Tensor) -> torch.Tensor:
    """int32 `[B, 64]`."""
    batch_size, slots = relevance.shape
    x = relevance.float()
    index = ((x.view(torch.int32) >> _SHIFT) - _FIRST).clamp(0, GATE_BINS - 1)
    # A negative number, which no attention is, has its sign in front: the lowest bin.
    index = index.masked_fill(x <= 0, 0)
    is_row = torch.arange(slots, device=x.device) < num_slots[:, None].clamp(1, slots)
    counted = (is_row & ~x.isnan()).int()
    empty = torch.zeros(batch_size, GATE_BINS, dtype=torch.int32, device=x.device)
    return empty.scatter_add(1, index.long(), counted)
