"""expand_tree: the next level of a draft tree, from one row of logits per node.

logit_stats computes the best `top_k` tokens and the log-sum-exp of every node. Then every child
counts the children that come before it, which is its rank: with C = W * top_k children these are
C^2 comparisons, none of which waits for another, where sorting needs log2(C)^2 / 2 exchanges and
picking the best again and again `width` maxima, one after the other. C is 64 in a tree of 8 by 8
and at most 1,024; one program ranks 32 children, so that a large level spreads over the device.

Reads / writes: what logit_stats does, 12 B * C bytes of its results (again, from cache, for every
32 children) and 16 B * width bytes of results. Grid of the kernel here: (ceil(C / 32), B).
Specification: lvspec.reference.expand_tree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.logit_stats import launch_logit_stats, partial_results

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _children(
    log_probs,
    top_ids,
    top_logits,
    lse,
    children,
    num_children,
    vocabulary,
    stride_node,
    TOP_K: tl.constexpr,
):
    """Log-probability and token of the children at `children`, and their order among equals."""
    mask = children < num_children
    nodes = children // TOP_K
    tokens = tl.load(top_ids + children, mask=mask, other=0)
    logits = tl.load(top_logits + children, mask=mask, other=-_INFINITY)
    relative = logits - tl.load(lse + nodes, mask=mask, other=0.0)
    parents = tl.load(log_probs + nodes.to(tl.int64) * stride_node, mask=mask, other=0.0)
    values = parents + relative
    values = tl.where(values == values, values, -_INFINITY)
    return values, tokens, nodes.to(tl.int64) * vocabulary + tokens


@triton.jit
def rank_children_kernel(
    log_probs,
    slots,
    top_ids,
    top_logits,
    lse,
    child_tokens,
    child_parents,
    child_log_probs,
    num_nodes,
    vocabulary,
    width,
    stride_batch,
    stride_node,
    stride_slots_batch,
    stride_slots_node,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Where `BLOCK` children of one sequence stand in the next level, if they do.

    They are compared with `OTHERS` children at a time.
    """
    batch = tl.program_id(1).to(tl.int64)
    num_children = num_nodes * TOP_K
    log_probs += batch * stride_batch
    slots += batch * stride_slots_batch
    top_ids += batch * num_children
    top_logits += batch * num_children
    lse += batch * num_nodes
    children = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values, tokens, order = _children(
        log_probs, top_ids, top_logits, lse, children, num_children, vocabulary, stride_node, TOP_K
    )
    # Summed at the end only: until then every comparison of a tile has a count of its own. Others
    # past the last child are -inf, of nodes past the last, so they come before none.
    counts = tl.zeros((BLOCK, OTHERS), tl.int32)
    for begin in range(0, num_children, OTHERS):
        others = begin + tl.arange(0, OTHERS)
        other_values, _, other_order = _children(
            log_probs,
            top_ids,
            top_logits,
            lse,
            others,
            num_children,
            vocabulary,
            stride_node,
            TOP_K,
        )
        is_before = (other_values[None, :] > values[:, None]) | (
            (other_values[None, :] == values[:, None]) & (other_order[None, :] < order[:, None])
        )
        counts += is_before.to(tl.int32)
    before = tl.sum(counts, axis=1)
    mask = (children < num_children) & (before < width)
    parents = tl.load(slots + (children // TOP_K).to(tl.int64) * stride_slots_node, mask=mask)
    row = batch * width
    tl.store(child_tokens + row + before, tokens.to(tl.int64), mask=mask)
    tl.store(child_parents + row + before, parents, mask=mask)
    tl.store(child_log_probs + row + before, values, mask=mask)


_LAUNCH = {"block": 32, "others": 64, "num_warps": 4}


def expand_tree(
    logits: torch.Tensor,
    log_probs: torch.Tensor,
    slots: torch.Tensor,
    width: int,
    top_k: int,
    workspace: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, parents, log_probs); see `lvspec.reference.expand_tree`."""
    batch_size, num_nodes, vocabulary = logits.shape
    device = logits.device
    rows = batch_size * num_nodes
    *partials, top_ids, top_logits, lse, entropy = launch.carve(
        workspace,
        device,
        *partial_results(rows, vocabulary),
        ((rows, top_k), torch.int32),
        ((rows, top_k), torch.float32),
        ((rows,), torch.float32),
        ((rows,), torch.float32),
    )
    launch_logit_stats(logits, top_k, partials, (top_ids, top_logits, lse, entropy))
    child_tokens = torch.empty((batch_size, width), dtype=torch.int64, device=device)
    child_parents = torch.empty((batch_size, width), dtype=torch.int32, device=device)
    child_log_probs = torch.empty((batch_size, width), dtype=torch.float32, device=device)
    num_children = num_nodes * top_k
    with launch.device_guard(logits):
        rank_children_kernel[(triton.cdiv(num_children, _LAUNCH["block"]), batch_size)](
            log_probs=log_probs,
            slots=slots,
            top_ids=top_ids,
            top_logits=top_logits,
            lse=lse,
            child_tokens=child_tokens,
            child_parents=child_parents,
            child_log_probs=child_log_probs,
            num_nodes=num_nodes,
            vocabulary=vocabulary,
            width=width,
            stride_batch=log_probs.stride(0),
            stride_node=log_probs.stride(1),
            stride_slots_batch=slots.stride(0),
            stride_slots_node=slots.stride(1),
            TOP_K=top_k,
            BLOCK=_LAUNCH["block"],
            OTHERS=_LAUNCH["others"],
            num_warps=_LAUNCH["num_warps"],
            num_stages=1,
        )
    return child_tokens, child_parents, child_log_probs
