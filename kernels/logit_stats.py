"""logit_stats: best tokens, log-sum-exp and entropy of every row of logits.

The first kernel reads every logit once and leaves three floats per group of 1,024: the maximum and,
relative to it, the sum of the weights and their entropy sum. It ranks nothing: the best K tokens of
a row can only be in the K groups whose maxima rank highest, and there only in the K pieces of 32
whose maxima rank highest. So the second kernel ranks maxima and reads K groups once more, for
V = 152,064 and K = 5 3.4 % of the row. To keep the best K of every group instead, K maxima of
64-bit keys, would take several times the 12 instructions per logit of the first kernel, which must
stay few for memory to be the limit. A program is one warp, so nothing in it waits for a barrier.

Reads / writes: B * S * (V + 1024 K) logits, 12 B * S * ceil(V / 1024) bytes of partial results
written and read, B * S * (8 K + 8) bytes of results. Grids: (ceil(groups / groups per program), S,
B) and (S, B). Specification: lvspec.reference.logit_stats.

A row's bits depend on its logits, V and how wide loads can be, not on B, S or the groups per
program. Loads are of 16 bytes where tokens are adjacent and V and the other strides are multiples
of 16, and otherwise of one logit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.workspace import VOCABULARY_BLOCK

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_INFINITY = tl.constexpr(float("inf"))
# exp2 of it is 0 in float32, as that of -inf, but 0 times it is not NaN.
_FLOOR = tl.constexpr(-200.0)
_ID_BITS = tl.constexpr(0x7FFFFFFF)
# Below every key, that of -inf too: float32 bits of -inf and NaN are not the lowest int32.
_NO_KEY = tl.constexpr(-(2**63))
_PIECE = 32  # logits of which the second kernel ranks the maximum


@triton.jit
def _exponents(values, level):
    """log2 of exp(values - level), NaN for NaN and finite for -inf."""
    return tl.maximum((values - level) * _LOG2_E, _FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _finite_or_zero(value):
    return tl.where(tl.abs(value) < _INFINITY, value, 0.0)


@triton.jit
def _keys(values, ids):
    """int64 that order as ranking does: by value, NaN as -inf, then the lower id first."""
    values = tl.where(values == values, values, -_INFINITY)
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (ids ^ _ID_BITS).to(tl.int64)


@triton.jit
def _key_ids(keys):
    return (keys & _ID_BITS).to(tl.int32) ^ _ID_BITS


@triton.jit
def _key_values(keys):
    ordered = (keys >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _best(keys, COUNT: tl.constexpr, RANKS: tl.constexpr):
    """The `COUNT` largest of distinct keys in order, in a tensor of length `RANKS`."""
    ranks = tl.arange(0, RANKS)
    best = tl.full((RANKS,), _NO_KEY, tl.int64)
    for rank in range(COUNT):
        highest = tl.max(keys)
        best = tl.where(ranks == rank, highest, best)
        keys = tl.where(keys == highest, _NO_KEY, keys)
    return best


@triton.jit(do_not_specialize=["groups_per_program"])
def sum_groups_kernel(
    logits,
    group_max,
    group_sum,
    group_entropy,
    vocabulary,
    num_groups,
    groups_per_program,
    stride_batch,
    stride_slot,
    stride_token,
    GROUP: tl.constexpr,
):
    """Maximum, sum and entropy sum of some adjacent groups of one row.

    NaN makes the sum NaN, as nothing else does. The maximum is of the other logits, if any.
    """
    slot = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = batch * tl.num_programs(1) + slot
    first = tl.program_id(0) * groups_per_program
    end = tl.minimum(first + groups_per_program, num_groups)
    logits += batch * stride_batch + slot * stride_slot
    tokens = first * GROUP + tl.arange(0, GROUP)
    following = tl.load(
        logits + tokens.to(tl.int64) * stride_token, mask=tokens < vocabulary, other=-_INFINITY
    )
    for group in range(first, end):
        values = following.to(tl.float32)
        # Requested before this group is worked on, so that a warp always waits for one in advance.
        tokens += GROUP
        following = tl.load(
            logits + tokens.to(tl.int64) * stride_token,
            mask=(tokens < vocabulary) & (tokens < end * GROUP),
            other=-_INFINITY,
        )
        highest = tl.max(values, axis=0)
        exponents = _exponents(values, _finite_or_zero(highest))
        weights = tl.exp2(exponents)
        offset = row * num_groups + group
        tl.store(group_max + offset, highest)
        tl.store(group_sum + offset, tl.sum(weights, axis=0))
        tl.store(group_entropy + offset, tl.sum(weights * exponents, axis=0))


@triton.jit
def merge_groups_kernel(
    logits,
    group_max,
    group_sum,
    group_entropy,
    top_ids,
    top_logits,
    lse,
    entropy,
    vocabulary,
    num_groups,
    stride_batch,
    stride_slot,
    stride_token,
    TOP_K: tl.constexpr,
    RANKS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One row: its sums from those of the groups, and its best tokens from the best groups."""
    slot = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + slot
    logits += batch * stride_batch + slot * stride_slot
    groups = tl.arange(0, GROUPS)
    offsets = row * num_groups + groups
    mask = groups < num_groups
    maxima = tl.load(group_max + offsets, mask=mask, other=-_INFINITY)
    sums = tl.load(group_sum + offsets, mask=mask, other=0.0)
    entropy_sums = tl.load(group_entropy + offsets, mask=mask, other=0.0)

    highest = tl.max(maxima, axis=0)
    exponents = _exponents(maxima, _finite_or_zero(highest))
    factors = tl.exp2(exponents)
    total = tl.sum(sums * factors, axis=0)
    entropy_total = tl.sum((entropy_sums + exponents * sums) * factors, axis=0)
    log_total = tl.log(total)
    # What is not finite needs no care: log(0) with m = -inf, log(inf) with m = inf, NaN from NaN.
    tl.store(lse + row, highest + log_total)
    tl.store(entropy + row, log_total - entropy_total * _LN_2 / total)

    # Tokens past the end of the row are -inf with higher ids than any token has, so they come last.
    ranks = tl.arange(0, RANKS)
    best = _best(_keys(maxima, groups), TOP_K, RANKS)
    chosen = tl.where(best == _NO_KEY, num_groups, _key_ids(best))
    pieces = chosen[:, None] * (GROUP // PIECE) + tl.arange(0, GROUP // PIECE)[None, :]
    tokens = pieces[:, :, None] * PIECE + tl.arange(0, PIECE)[None, None, :]
    values = tl.load(
        logits + tokens.to(tl.int64) * stride_token, mask=tokens < vocabulary, other=-_INFINITY
    )
    piece_maxima = tl.max(values.to(tl.float32), axis=2)
    best = _best(_keys(piece_maxima, pieces), TOP_K, RANKS)
    chosen = tl.where(best == _NO_KEY, num_groups * (GROUP // PIECE), _key_ids(best))
    tokens = chosen[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    values = tl.load(
        logits + tokens.to(tl.int64) * stride_token, mask=tokens < vocabulary, other=-_INFINITY
    )
    best = _best(_keys(values.to(tl.float32), tokens), TOP_K, RANKS)
    tl.store(top_ids + row * TOP_K + ranks, _key_ids(best), mask=ranks < TOP_K)
    tl.store(top_logits + row * TOP_K + ranks, _key_values(best), mask=ranks < TOP_K)


# A program of the first kernel takes `groups` groups, fewer where that would leave less than
# `programs` programs. Warps of the first and of the second kernel.
_LAUNCH = {
    "sm80": {"groups": 4, "programs": 8192, "sum_warps": 1, "merge_warps": 8},
    "sm90": {"groups": 4, "programs": 16384, "sum_warps": 1, "merge_warps": 8},
    "sm100": {"groups": 4, "programs": 16384, "sum_warps": 1, "merge_warps": 8},
}


def logit_stats(
    logits: torch.Tensor, top_k: int, workspace: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """(top_ids, top_logits, lse, entropy); see `lvspec.reference.logit_stats`."""
    batch_size, num_slots, vocabulary = logits.shape
    partials = launch.carve(
        workspace, logits.device, *partial_results(batch_size * num_slots, vocabulary)
    )
    rows = (batch_size, num_slots)
    results = (
        torch.empty((*rows, top_k), dtype=torch.int32, device=logits.device),
        torch.empty((*rows, top_k), dtype=torch.float32, device=logits.device),
        torch.empty(rows, dtype=torch.float32, device=logits.device),
        torch.empty(rows, dtype=torch.float32, device=logits.device),
    )
    launch_logit_stats(logits, top_k, partials, results)
    return results


def partial_results(rows: int, vocabulary: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what the first kernel leaves for the second, for `launch.carve`."""
    return [((rows, triton.cdiv(vocabulary, VOCABULARY_BLOCK)), torch.float32)] * 3


def launch_logit_stats(
    logits: torch.Tensor,
    top_k: int,
    partials: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor],
) -> None:
    """Fill contiguous `results`, as many rows as `logits` has; `expand_tree` has its own."""
    batch_size, num_slots, vocabulary = logits.shape
    group_max, group_sum, group_entropy = partials
    top_ids, top_logits, lse, entropy = results
    num_groups = group_max.shape[1]
    config = _LAUNCH[launch.device_class(logits.device)]
    programs = batch_size * num_slots * num_groups // config["programs"]
    groups_per_program = min(max(programs, 1), config["groups"])
    stride_batch, stride_slot, stride_token = logits.stride()
    with launch.device_guard(logits):
        sum_groups_kernel[(triton.cdiv(num_groups, groups_per_program), num_slots, batch_size)](
            logits=logits,
            group_max=group_max,
            group_sum=group_sum,
            group_entropy=group_entropy,
            vocabulary=vocabulary,
            num_groups=num_groups,
            groups_per_program=groups_per_program,
            stride_batch=stride_batch,
            stride_slot=stride_slot,
            stride_token=stride_token,
            GROUP=VOCABULARY_BLOCK,
            num_warps=config["sum_warps"],
            num_stages=1,
        )
        merge_groups_kernel[(num_slots, batch_size)](
            logits=logits,
            group_max=group_max,
            group_sum=group_sum,
            group_entropy=group_entropy,
            top_ids=top_ids,
            top_logits=top_logits,
            lse=lse,
            entropy=entropy,
            vocabulary=vocabulary,
            num_groups=num_groups,
            stride_batch=stride_batch,
            stride_slot=stride_slot,
            stride_token=stride_token,
            TOP_K=top_k,
            RANKS=triton.next_power_of_2(top_k),
            GROUPS=triton.next_power_of_2(num_groups),
            GROUP=VOCABULARY_BLOCK,
            PIECE=_PIECE,
            num_warps=config["merge_warps"],
            num_stages=1,
        )
