"""expand_tree: the next level of a draft tree."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lvspec.reference.logit_stats import logit_stats


class TreeLevel(NamedTuple):
    """What `expand_tree` returns: the nodes of the next level, best first."""

    tokens: torch.Tensor  # int64 [B, width]
    parents: torch.Tensor  # int32 [B, width], slots of their parents
    log_probs: torch.Tensor  # float32 (float64 for float64 input) [B, width], from the root on


def expand_tree(
    logits: torch.Tensor,
    log_probs: torch.Tensor,
    slots: torch.Tensor,
    *,
    width: int,
    top_k: int | None = None,
) -> TreeLevel:
    """The best `width` children of the nodes of one level of a draft tree.

    Every node offers the `top_k` best tokens of its row, ranked as `logit_stats` ranks them. A
    child's log-probability is `log_probs[b, w] + (logit - lse)`; NaN counts as -inf. Children are
    ordered by it, best first, ties to the lower node index w, then to the lower token id. A child
    with -inf (of a padding node, or of a banned token) comes last and marks padding: the caller
    leaves it out. The first level is W = 1, `log_probs` 0 and `slots` 0.

    Worked example (W = 2, V = 3, `width` = 3, `top_k` = 2, `slots` = [4, 7])::

        node 0: log_prob ln 0.5, probabilities [0.2, 0.2, 0.6]  offers 2 (0.30), 0 (0.10)
        node 1: log_prob ln 0.4, probabilities [0.25, 0.75, 0]  offers 1 (0.30), 0 (0.10)
        ->  tokens [2, 1, 0]   parents [4, 7, 4]   log_probs ln [0.3, 0.3, 0.1]

    Args:
        logits: float `[B, W, V]`, the draft's rows of the current level.
        log_probs: float32 (float64 for float64 input) `[B, W]`, -inf for a padding node.
        slots: int32 `[B, W]`, the slot of every node.
        width: Nodes of the next level, at most `W * top_k`.
        top_k: Children a node offers, from 1 to 16 and at most V. Default: `min(width, V, 16)`.

    Returns:
        TreeLevel.
    """
    num_nodes, vocabulary = logits.shape[1:]
    count = min(width, vocabulary, 16) if top_k is None else top_k
    top_ids, top_logits, lse, _ = logit_stats(logits, top_k=count)
    ids, order = top_ids.sort(dim=-1)  # so that the stable sort below breaks ties by id
    child_log_probs = log_probs[:, :, None] + (top_logits.gather(-1, order) - lse[:, :, None])
    child_log_probs = child_log_probs.nan_to_num(nan=-math.inf, neginf=-math.inf).flatten(1)
    best, order = child_log_probs.sort(dim=-1, descending=True, stable=True)
    best, order = best[:, :width], order[:, :width]
    return TreeLevel(
        ids.flatten(1).gather(1, order).long(),
        slots.gather(1, order // count),
        best.contiguous(),
    )
