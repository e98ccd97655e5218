"""How much scratch memory the operations need, for callers that own it."""

from __future__ import annotations

from lvspec.kernels.workspace import (
    accept_sampled_bytes,
    expand_tree_bytes,
    num_masked_pieces,
    verify_attention_bytes,
)
from lvspec.policy import MAX_TOP_K


def workspace_size(
    *,
    batch_size: int,
    num_slots: int,
    num_q_heads: int,
    head_dim: int,
    capacity: int,
    vocabulary: int,
    num_pieces: int = 0,
    top_k: int = MAX_TOP_K,
) -> int:
    """Bytes of `workspace` with which any operation of these sizes allocates only its results.

    Make one uint8 tensor of this length on the device and hand it to every call on one stream; the
    operations leave nothing in it that a later one needs.

    Args:
        batch_size: B.
        num_slots: S.
        num_q_heads: Hq.
        head_dim: D.
        capacity: N, for paged caches `max_pages * page_size`.
        vocabulary: V, the larger of the target's and the draft's.
        num_pieces: P of the split plan, `plan.start.shape[1]`; 0 if none is used.
        top_k: The most that `logit_stats` and `expand_tree` are asked for.
    """
    pieces = max(num_pieces, num_masked_pieces(capacity))
    rows = batch_size * num_slots
    return max(
        verify_attention_bytes(batch_size, num_q_heads, num_slots, head_dim, pieces),
        expand_tree_bytes(rows, vocabulary, top_k),
        accept_sampled_bytes(batch_size, num_slots, vocabulary, vocabulary),
    )
