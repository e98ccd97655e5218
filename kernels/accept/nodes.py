"""What the walk asks of nodes: an order of their regrets, and which of them are late shifts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bitwise_or(left, right):
    return left | right


@triton.jit
def ordered_bits(value):
    """An integer that sorts as the float does, since minima of integers take one instruction."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered_bits(bits):
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def late_slots(
    token,
    parent,
    has_parent,
    slot,
    parents_row,
    top_ids_row,
    shift_window,
    parents_stride_slot,
    top_ids_stride_slot,
):
    """Whether a node at most `shift_window` levels below brings what the slot displaced.

    Every node looks upwards and votes for the ancestors that wanted its token.
    """
    votes = slot.to(tl.int64) * 0
    ancestor = parent
    reached = has_parent
    for _ in range(shift_window):
        node = tl.where(reached, ancestor, 0).to(tl.int64)
        above = tl.load(parents_row + node * parents_stride_slot, mask=reached, other=-1)
        reached &= (above >= 0) & (above < ancestor)
        row = tl.where(reached, above, 0).to(tl.int64)
        displaced = tl.load(top_ids_row + row * top_ids_stride_slot, mask=reached, other=-1)
        one = tl.full(slot.shape, 1, tl.int64)
        votes |= tl.where(reached & (token == displaced), one << node, 0)
        ancestor = above
    elected = tl.reduce(votes, 0, _bitwise_or)
    return ((elected >> slot.to(tl.int64)) & 1) != 0
