"""All paths of one sequence, from what its nodes are to the best path that stands."""

from __future__ import annotations

import triton
import triton.language as tl

from lvspec.kernels.accept.shifts import brought_slots
from lvspec.kernels.rule import (
    ANCHOR_REGRET,
    ANCHOR_THRESHOLD,
    ENTROPY_TOP,
    MAX_REGRET,
    MAX_RUN,
    MIN_ENTROPY,
    MIN_LOG_PROB,
    PATH_REGRET,
    REGRET_BUDGET,
    REGRET_RATE,
    SHIFT_REGRET,
    SHIFT_WINDOW,
    TOP_K,
    TYPICAL_LOG_DELTA,
    TYPICAL_LOG_EPS,
    WINDOW,
)

_INFINITY = tl.constexpr(float("inf"))
_LOWEST = tl.constexpr(-3.4028234663852886e38)
# Exact tokens in a row where no mismatch is above them: more than any window.
_NO_MISMATCH = tl.constexpr(1 << 20)


# The sizes of a call are no reason to compile again.
@triton.jit(
    do_not_specialize=[
        "num_rows",
        "vocabulary",
        "kept",
        "num_strict_ids",
        "num_eos_ids",
        "logits_stride_batch",
        "logits_stride_slot",
        "logits_stride_token",
        "tokens_stride_batch",
        "tokens_stride_slot",
        "parents_stride_batch",
        "parents_stride_slot",
        "num_slots_stride",
        "top_ids_stride_batch",
        "top_ids_stride_slot",
        "top_ids_stride_rank",
        "top_logits_stride_batch",
        "top_logits_stride_slot",
        "top_logits_stride_rank",
        "lse_stride_batch",
        "lse_stride_slot",
        "entropy_stride_batch",
        "entropy_stride_slot",
        "relevance_stride_batch",
        "relevance_stride_slot",
        "regret_used_stride",
        "strict_ids_stride_batch",
        "strict_ids_stride_id",
        "eos_ids_stride",
        "rule_stride_batch",
        "rule_stride_column",
    ]
)
def accept_kernel(
    # inputs
    logits,
    tokens,
    parents,
    num_slots,
    top_ids,
    top_logits,
    lse,
    entropy,
    relevance,
    regret_used,
    strict_ids,
    eos_ids,
    rule,
    # outputs
    path,
    num_accepted,
    bonus_id,
    kind,
    regret,
    # sizes
    num_rows,
    vocabulary,
    kept,
    num_strict_ids,
    num_eos_ids,
    # strides
    logits_stride_batch,
    logits_stride_slot,
    logits_stride_token,
    tokens_stride_batch,
    tokens_stride_slot,
    parents_stride_batch,
    parents_stride_slot,
    num_slots_stride,
    top_ids_stride_batch,
    top_ids_stride_slot,
    top_ids_stride_rank,
    top_logits_stride_batch,
    top_logits_stride_slot,
    top_logits_stride_rank,
    lse_stride_batch,
    lse_stride_slot,
    entropy_stride_batch,
    entropy_stride_slot,
    relevance_stride_batch,
    relevance_stride_slot,
    regret_used_stride,
    strict_ids_stride_batch,
    strict_ids_stride_id,
    eos_ids_stride,
    rule_stride_batch,
    rule_stride_column,
    # flags
    HAS_RELEVANCE: tl.constexpr,
    HAS_REGRET_USED: tl.constexpr,
    # tiles
    BLOCK_S: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    tokens_row = tokens + sequence * tokens_stride_batch
    parents_row = parents + sequence * parents_stride_batch
    top_ids_row = top_ids + sequence * top_ids_stride_batch
    top_logits_row = top_logits + sequence * top_logits_stride_batch
    numbers = rule + sequence * rule_stride_batch

    slot = tl.arange(0, BLOCK_S)
    exists = slot < num_rows
    offset = slot.to(tl.int64)
    own_bit = tl.full((BLOCK_S,), 1, tl.int64) << offset
    anchor_threshold = tl.load(numbers + ANCHOR_THRESHOLD * rule_stride_column)
    anchor_regret = tl.load(numbers + ANCHOR_REGRET * rule_stride_column)
    levels = tl.load(numbers + SHIFT_WINDOW * rule_stride_column).to(tl.int32)
    in_use = tl.load(num_slots + sequence * num_slots_stride)
    token = tl.load(tokens_row + offset * tokens_stride_slot, mask=exists, other=-1)
    parent = tl.load(parents_row + offset * parents_stride_slot, mask=exists, other=-1)
    in_use = tl.minimum(tl.maximum(in_use, 1), num_rows)
    has_parent = (slot < in_use) & (parent >= 0) & (parent < slot)

    up = tl.where(has_parent, parent, 0)
    row = up.to(tl.int64)
    wanted = tl.load(top_ids_row + row * top_ids_stride_slot, mask=has_parent, other=-1)
    parent_token = tl.gather(token, up, 0)

    has_ended = slot < 0
    guarded = slot < 0
    for i in range(num_eos_ids):
        eos_id = tl.load(eos_ids + i * eos_ids_stride)
        has_ended |= parent_token == eos_id
        guarded |= (token == eos_id) | (wanted == eos_id)

    is_mismatch = has_parent & (token != wanted)
    # Whether a path may go on to the slot, and how: what a rule of exact matches leaves as it is.
    is_open = has_parent & ~has_ended & ~is_mismatch
    loose = slot < 0
    own_regret = tl.zeros((BLOCK_S,), tl.float64)
    brought = offset * 0
    awaited = offset * 0  # the slot's own bit where it stands only if its word comes behind it
    is_tolerant = (anchor_threshold > -_INFINITY) | (anchor_regret > -_INFINITY) | (levels > 0)
    if is_tolerant:
        max_regret = tl.load(numbers + MAX_REGRET * rule_stride_column)
        top_k = tl.load(numbers + TOP_K * rule_stride_column).to(tl.int32)
        min_log_prob = tl.load(numbers + MIN_LOG_PROB * rule_stride_column)
        typical_log_eps = tl.load(numbers + TYPICAL_LOG_EPS * rule_stride_column)
        min_entropy = tl.load(numbers + MIN_ENTROPY * rule_stride_column)
        best = tl.load(
            top_logits_row + row * top_logits_stride_slot, mask=has_parent, other=-_INFINITY
        )
        norm = tl.load(
            lse + sequence * lse_stride_batch + row * lse_stride_slot,
            mask=has_parent,
            other=_INFINITY,
        )
        own = tl.load(
            logits
            + sequence * logits_stride_batch
            + row * logits_stride_slot
            + token * logits_stride_token,
            mask=is_mismatch & (token >= 0) & (token < vocabulary),
            other=-_INFINITY,
        ).to(tl.float32)
        strict_row = strict_ids + sequence * strict_ids_stride_batch
        for i in range(num_strict_ids):
            strict_id = tl.load(strict_row + i * strict_ids_stride_id)
            guarded |= (token == strict_id) | (wanted == strict_id)
        node_regret = best - own
        log_prob = own - norm
        # A NaN fails these comparisons as an infinity does.
        is_regular = (tl.abs(norm) < _INFINITY) & (tl.abs(node_regret) < _INFINITY)
        may_stand = is_mismatch & ~has_ended & ~guarded & is_regular

        is_anchor = tl.zeros((BLOCK_S,), tl.float32) + anchor_threshold < _INFINITY
        if HAS_RELEVANCE:
            seen = tl.load(
                relevance + sequence * relevance_stride_batch + row * relevance_stride_slot,
                mask=has_parent,
                other=float("nan"),
            )
            is_anchor &= ~(seen < anchor_threshold)
        # Limits that are off hold numbers that nothing here fails.
        loose = may_stand & (node_regret <= tl.where(is_anchor, anchor_regret, max_regret))
        loose &= log_prob >= min_log_prob
        if top_k > 0:
            is_listed = slot < 0
            for i in range(tl.minimum(top_k, kept)):
                listed = tl.load(
                    top_ids_row + row * top_ids_stride_slot + i * top_ids_stride_rank,
                    mask=has_parent,
                    other=-1,
                )
                is_listed |= token == listed
            loose &= is_listed
        if typical_log_eps > -_INFINITY:
            uncertainty = tl.load(
                entropy + sequence * entropy_stride_batch + row * entropy_stride_slot,
                mask=has_parent,
                other=0.0,
            )
            floor = tl.load(numbers + TYPICAL_LOG_DELTA * rule_stride_column) - uncertainty
            floor = tl.where(floor > typical_log_eps, typical_log_eps, floor)
            loose &= log_prob >= floor
        if min_entropy > -_INFINITY:
            entropy_top = tl.load(numbers + ENTROPY_TOP * rule_stride_column).to(tl.int32)
            gate = tl.zeros((BLOCK_S,), tl.float32)
            for i in range(tl.minimum(entropy_top, kept)):
                listed_logit = tl.load(
                    top_logits_row + row * top_logits_stride_slot + i * top_logits_stride_rank,
                    mask=has_parent,
                    other=-_INFINITY,
                )
                listed_log_prob = listed_logit - norm
                # Not -inf, of which 0 times is NaN.
                gate -= tl.exp(listed_log_prob) * tl.maximum(listed_log_prob, _LOWEST)
            loose &= gate >= min_entropy
        shift = slot < 0
        late = slot < 0
        if levels > 0:
            shift_regret = tl.load(numbers + SHIFT_REGRET * rule_stride_column)
            shiftable = may_stand & (node_regret <= shift_regret)
            brought = brought_slots(token, wanted, up, slot, levels)
            mismatches = tl.sum(tl.where(is_mismatch, own_bit, 0), axis=0)
            shift = shiftable & ~is_anchor & ((brought & mismatches) != 0)
            late = shiftable & ((tl.reduce_or(brought, 0) & own_bit) != 0)
        is_open |= loose | shift | late
        awaited = tl.where(late & ~loose & ~shift, own_bit, 0)
        own_regret = tl.where(loose | shift | late, node_regret, 0.0).to(tl.float64)

    # What became of the path that ends in a slot follows from its parent's, so what is true of a
    # depth after a step stays so. Not on a path: -1 deep.
    window = tl.load(numbers + WINDOW * rule_stride_column).to(tl.int32)
    max_run = tl.load(numbers + MAX_RUN * rule_stride_column).to(tl.int32)
    budget = tl.load(numbers + REGRET_BUDGET * rule_stride_column).to(tl.float64)
    rate = tl.load(numbers + REGRET_RATE * rule_stride_column).to(tl.float64)
    depth = tl.where(slot == 0, 0, -1)
    streak = tl.full((BLOCK_S,), _NO_MISMATCH, tl.int32)  # exact ones in a row; mismatches negative
    ancestors = own_bit
    waiting = offset * 0
    total = tl.zeros((BLOCK_S,), tl.float64)
    spent = total
    if HAS_REGRET_USED:
        spent += tl.load(regret_used + sequence * regret_used_stride).to(tl.float64)
    before = tl.full((), 0, tl.int32)
    reached = tl.full((), 1, tl.int32)
    while reached > before:
        before = reached
        above = tl.gather(depth, up, 0)
        exact_above = tl.gather(streak, up, 0)
        run = 1 - tl.minimum(exact_above, 0)
        exact_above = tl.maximum(exact_above, 0)
        streak = tl.where(is_mismatch, -run, tl.minimum(exact_above + 1, _NO_MISMATCH))
        ancestors = tl.gather(ancestors, up, 0) | own_bit
        waiting = (tl.gather(waiting, up, 0) | awaited) & ~brought
        total = tl.gather(total, up, 0) + own_regret
        spent = tl.gather(spent, up, 0) + own_regret
        allowed = budget + rate * (above + 1)
        affordable = (allowed == _INFINITY) | (spent <= allowed)
        stands_so_far = (exact_above >= window) & (run <= max_run) & affordable
        goes_on = is_open & (above >= 0) & (~is_mismatch | stands_so_far)
        depth = tl.where(goes_on, above + 1, depth)
        reached = tl.sum((depth >= 0).to(tl.int32), axis=0)

    stands = (depth >= 0) & (waiting == 0) & (tl.maximum(streak, 0) >= window)
    inner = tl.reduce_or(tl.where(stands, ancestors & ~own_bit, 0), 0)
    is_end = stands & ((inner & own_bit) == 0)
    weight = tl.load(numbers + PATH_REGRET * rule_stride_column).to(tl.float64)
    score = tl.where(is_end, depth - weight * total, -_INFINITY)
    is_end &= score == tl.max(score, axis=0)
    least = tl.min(tl.where(is_end, total, _INFINITY), axis=0)
    end = tl.min(tl.where(is_end & (total == least), slot, BLOCK_S), axis=0)

    length = tl.sum(tl.where(slot == end, depth, 0), axis=0)
    members = tl.sum(tl.where(slot == end, ancestors, 0), axis=0)
    bonus = tl.load(top_ids_row + end.to(tl.int64) * top_ids_stride_slot)
    path += sequence * num_rows
    kind += sequence * num_rows
    on_path = (members & own_bit) != 0
    tl.store(path + depth, slot, mask=on_path)
    tl.store(path + slot, -1, mask=exists & (slot > length))
    of_node = tl.where(is_mismatch, tl.where(loose, 1, 2), 0)
    tl.store(kind + depth, of_node.to(tl.uint8), mask=on_path)
    tl.store(kind + slot, tl.full((BLOCK_S,), 255, tl.uint8), mask=exists & (slot > length))
    tl.store(num_accepted + sequence, length)
    tl.store(bonus_id + sequence, bonus.to(tl.int64))
    tl.store(regret + sequence, least.to(tl.float32))
