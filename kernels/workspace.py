"""Bytes of workspace per operation, without triton, so that any process can ask.

Must agree with what the launchers carve; `tests/ops` holds both together.
"""

from __future__ import annotations

MASKED_PIECE = 512
"""Length of verify_attention's pieces where no plan is given."""

VOCABULARY_BLOCK = 1024
"""Adjacent logits of a row of which logit_stats keeps partial results."""

SAMPLING_BLOCK = 4096
"""Logits per program of accept_sampled."""


def verify_attention_bytes(
    batch_size: int, num_q_heads: int, num_slots: int, head_dim: int, num_pieces: int
) -> int:
    """Partial sums of `num_pieces` pieces and the tree: output, maximum, sum and two scores."""
    rows = batch_size * num_q_heads * num_slots * (num_pieces + 1)
    return padded(4 * rows * head_dim) + 4 * padded(4 * rows)


def num_masked_pieces(capacity: int) -> int:
    """Pieces of a cache of `capacity` positions where no plan is given."""
    return -(-capacity // MASKED_PIECE)


def logit_stats_bytes(rows: int, vocabulary: int, top_k: int) -> int:
    """Per row and block: maximum, sum and entropy sum. The best tokens, however many, need none."""
    return 3 * padded(4 * rows * -(-vocabulary // VOCABULARY_BLOCK))


def padded(size: int) -> int:
    """`size` rounded up to the alignment of a part of the workspace."""
    return -(-size // 16) * 16


def expand_tree_bytes(rows: int, vocabulary: int, top_k: int) -> int:
    """logit_stats of every node, and its results."""
    results = 2 * padded(4 * rows * top_k) + 2 * padded(4 * rows)
    return logit_stats_bytes(rows, vocabulary, top_k) + results


def accept_sampled_bytes(
    batch_size: int, num_slots: int, vocabulary: int, draft_vocabulary: int
) -> int:
    """Per row and block maximum and sum, of target and draft; four floats and a verdict per row;
    residual sums of one row a sequence. `draft_vocabulary` is 0 without draft logits."""
    rows = batch_size * num_slots
    blocks = -(-vocabulary // SAMPLING_BLOCK)
    draft_blocks = -(-draft_vocabulary // SAMPLING_BLOCK)
    partial = 2 * padded(4 * rows * blocks) + 2 * padded(4 * rows * draft_blocks)
    return partial + 5 * padded(4 * rows) + padded(4 * batch_size * blocks)
