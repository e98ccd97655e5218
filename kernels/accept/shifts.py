"""Shifts: which tokens a node brings that were displaced a little above it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def brought_slots(token, wanted, up, slot, levels):
    """Of every slot the bits of those at most `levels` above it whose row wanted its token.

    Every node looks upwards, whether it is on a path or not. `up` is the parent, the root's the
    root, which no row wanted.
    """
    brought = slot.to(tl.int64) * 0
    node = up
    for _ in range(levels):
        displaced = tl.gather(wanted, node, 0)
        bit = tl.full(slot.shape, 1, tl.int64) << node.to(tl.int64)
        brought |= tl.where((node > 0) & (token == displaced), bit, 0)
        node = tl.gather(up, node, 0)
    return brought
