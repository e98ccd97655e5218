"""The walk of one sequence, from what its nodes are to where its path is cut."""

from __future__ import annotations

import triton
import triton.language as tl

from lvspec.kernels.accept.nodes import from_ordered_bits, late_slots, ordered_bits

_INFINITY = tl.constexpr(float("inf"))
_LOWEST = tl.constexpr(-3.4028234663852886e38)
# A length no path has.
_NEVER = tl.constexpr(1 << 20)
# Behind every key of a finite float.
_LAST_KEY = tl.constexpr(0x7FFFFFFF)


# The numbers of a policy and the sizes of a call are no reason to compile again.
@triton.jit(
    do_not_specialize=[
        "top_k",
        "entropy_top",
        "shift_window",
        "window",
        "max_run",
        "num_rows",
        "vocabulary",
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
    anchor_threshold,
    max_regret,
    top_k,
    min_log_prob,
    typical_log_eps,
    typical_log_delta,
    min_entropy,
    entropy_top,
    shift_window,
    window,
    max_run,
    regret_budget,
    # outputs
    path,
    num_accepted,
    bonus_id,
    kind,
    regret,
    # sizes
    num_rows,
    vocabulary,
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

    slot = tl.arange(0, BLOCK_S)
    exists = slot < num_rows
    offset = slot.to(tl.int64)
    in_use = tl.load(num_slots + sequence * num_slots_stride)
    token = tl.load(tokens_row + offset * tokens_stride_slot, mask=exists, other=-1)
    parent = tl.load(parents_row + offset * parents_stride_slot, mask=exists, other=-1)
    in_use = tl.minimum(tl.maximum(in_use, 1), num_rows)
    has_parent = (slot < in_use) & (parent >= 0) & (parent < slot)

    row = tl.where(has_parent, parent, 0).to(tl.int64)
    wanted = tl.load(top_ids_row + row * top_ids_stride_slot, mask=has_parent, other=-1)
    parent_token = tl.load(tokens_row + row * tokens_stride_slot, mask=has_parent, other=-1)

    has_ended = slot < 0
    guarded = slot < 0
    for i in range(num_eos_ids):
        eos_id = tl.load(eos_ids + i)
        has_ended |= parent_token == eos_id
        guarded |= (token == eos_id) | (wanted == eos_id)

    is_mismatch = has_parent & (token != wanted)
    exact_parent = tl.where(has_parent & (token == wanted) & ~has_ended, parent, -1)

    # What a policy of exact matches only leaves as it is.
    is_open = slot < 0
    loose = slot < 0
    late = slot < 0
    key = slot * 0
    is_tolerant = (anchor_threshold > -_INFINITY) | (shift_window > 0)
    if is_tolerant:
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
        for i in range(num_strict_ids):
            strict_id = tl.load(strict_ids + i)
            guarded |= (token == strict_id) | (wanted == strict_id)
        node_regret = best - own
        log_prob = own - norm
        # A NaN fails these comparisons as an infinity does.
        is_open = (
            is_mismatch & ~guarded & (tl.abs(norm) < _INFINITY) & (tl.abs(node_regret) < _INFINITY)
        )
        key = ordered_bits(node_regret)

        # Limits that are off hold numbers that no open node fails.
        loose = is_open & (node_regret <= max_regret) & (log_prob >= min_log_prob)
        if HAS_RELEVANCE:
            seen = tl.load(
                relevance + sequence * relevance_stride_batch + row * relevance_stride_slot,
                mask=has_parent,
                other=float("nan"),
            )
            loose &= (seen < anchor_threshold) | (anchor_threshold == _INFINITY)
        else:
            loose &= anchor_threshold == _INFINITY
        if top_k > 0:
            is_listed = slot < 0
            for i in range(top_k):
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
            floor = typical_log_delta - uncertainty
            floor = tl.where(floor > typical_log_eps, typical_log_eps, floor)
            loose &= log_prob >= floor
        if min_entropy > -_INFINITY:
            gate = tl.zeros((BLOCK_S,), tl.float32)
            for i in range(entropy_top):
                listed_logit = tl.load(
                    top_logits_row + row * top_logits_stride_slot + i * top_logits_stride_rank,
                    mask=has_parent,
                    other=-_INFINITY,
                )
                listed_log_prob = listed_logit - norm
                # Not -inf, of which 0 times is NaN.
                gate -= tl.exp(listed_log_prob) * tl.maximum(listed_log_prob, _LOWEST)
            loose &= gate >= min_entropy
        if shift_window > 0:
            late = is_open & late_slots(
                token,
                parent,
                has_parent,
                slot,
                parents_row,
                top_ids_row,
                shift_window,
                parents_stride_slot,
                top_ids_stride_slot,
            )
    open_parent = tl.where(is_open & ~has_ended, parent, -1)

    # The walk. From here on `slot` is an index of the path where a vector is the path's.
    walked = slot * 0
    kinds = slot * 0
    lost = slot * 0 - 1  # the token that a mismatch displaced, and so where the mismatches are
    needed = slot * 0
    is_lost_cause = slot < 0
    totals = tl.zeros((BLOCK_S,), tl.float64)
    total = tl.full((), 0.0, tl.float64)
    spent = total
    if HAS_REGRET_USED:
        spent = tl.load(regret_used + sequence * regret_used_stride).to(tl.float64)
    length = tl.full((), 1, tl.int32)
    run = tl.full((), 0, tl.int32)
    num_mismatches = tl.full((), 0, tl.int32)
    last = tl.full((), 0, tl.int32)
    while last >= 0:
        child = tl.min(tl.where(exact_parent == last, slot, BLOCK_S), axis=0)
        if child < BLOCK_S:
            run = length * 0
        elif is_tolerant:
            early = slot < 0
            for back in range(1, tl.minimum(shift_window, length - 1) + 1):
                displaced = tl.max(tl.where(slot == length - back, lost, -1), axis=0)
                early |= token == displaced
            is_candidate = (open_parent == last) & (loose | late | early)
            least = tl.min(tl.where(is_candidate, key, _LAST_KEY), axis=0)
            # The lowest slot, and below it whether it is loose and early.
            packed = slot * 4 + tl.where(loose, 1, 0) + tl.where(early, 2, 0)
            choice = tl.min(
                tl.where(is_candidate & (key == least), packed, 4 * BLOCK_S),
                axis=0,
            )
            child = choice >> 2
            if child < BLOCK_S:
                regret_here = from_ordered_bits(least).to(tl.float64)
                total += regret_here
                spent += regret_here
                run += 1
                num_mismatches += 1
                here = slot == length
                affordable = (regret_budget == _INFINITY) | (spent <= regret_budget)
                is_lost_cause |= here & ((run > max_run) | ~affordable)
                # Those that this one follows too closely.
                is_lost_cause |= (lost >= 0) & (slot >= length - window)
                kinds = tl.where(here, tl.where((choice & 1) != 0, 1, 2), kinds)
                needed = tl.where(here & ((choice & 3) == 0), _NEVER, needed)
                totals = tl.where(here, total, totals)
                displaced_here = tl.load(top_ids_row + last.to(tl.int64) * top_ids_stride_slot)
                lost = tl.where(here, displaced_here, lost)
        if child < BLOCK_S:
            if (shift_window > 0) & (num_mismatches > 0):
                brought = tl.load(tokens_row + child.to(tl.int64) * tokens_stride_slot)
                is_near = (slot < length) & (slot >= length - shift_window)
                found = is_near & (lost == brought) & (needed == _NEVER)
                needed = tl.where(found, length + 1, needed)
            walked = tl.where(slot == length, child, walked)
            length += 1
            last = child
        else:
            last = length * 0 - 1

    # The cut.
    if num_mismatches > 0:
        needed = tl.where(is_lost_cause, _NEVER, tl.maximum(needed, slot + 1 + window))
        needed = tl.where(lost >= 0, needed, 0)
        cut = tl.min(tl.where((slot < length) & (needed > length), slot, length), axis=0)
        while cut < length:
            length = cut
            cut = tl.min(tl.where((slot < length) & (needed > length), slot, length), axis=0)
        final = tl.max(tl.where((slot < length) & (lost >= 0), slot, 0), axis=0)
        total = tl.sum(tl.where(slot == final, totals, 0.0), axis=0)

    end = tl.max(tl.where(slot == length - 1, walked, 0), axis=0)
    bonus = tl.load(top_ids_row + end.to(tl.int64) * top_ids_stride_slot)
    is_kept = slot < length
    tl.store(path + sequence * num_rows + slot, tl.where(is_kept, walked, -1), mask=exists)
    tl.store(
        kind + sequence * num_rows + slot,
        tl.where(is_kept, kinds, 255).to(tl.uint8),
        mask=exists,
    )
    tl.store(num_accepted + sequence, length - 1)
    tl.store(bonus_id + sequence, bonus.to(tl.int64))
    tl.store(regret + sequence, total.to(tl.float32))
