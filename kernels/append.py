"""append: what was accepted becomes output, and the lengths move on.

Reads / writes: a few numbers a slot. In PyTorch these are some fifty kernels an iteration. Grid:
one program a sequence, along x. Specification: lvspec.reference.append.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch


@triton.jit
def append_kernel(
    out_ids,
    out_kinds,
    out_relevance,
    num_out,
    max_new,
    last_two,
    regret_used,
    finished,
    eos_ids,
    kv_len,
    tokens,
    num_slots,
    path,
    num_accepted,
    bonus_id,
    kind,
    regret,
    lse,
    relevance,
    report,
    slots,
    width,
    num_eos_ids,
    stride_relevance_sequence,
    stride_relevance_slot,
    HEAD: tl.constexpr,
    BONUS: tl.constexpr,
    NO_NAN: tl.constexpr,
    HAS_RELEVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    is_slot = i < slots
    begin = sequence * slots
    accepted = tl.load(num_accepted + sequence)
    bonus = tl.load(bonus_id + sequence)
    count = tl.load(num_out + sequence)
    was_finished = tl.load(finished + sequence) != 0

    # What is no slot counts as the root, which is on every path.
    row = tl.maximum(tl.load(path + begin + i, mask=is_slot, other=0), 0)
    following = tl.where(i + 1 < slots, i + 1, 0)
    next_row = tl.maximum(tl.load(path + begin + following, mask=is_slot, other=0), 0)
    is_draft = i < accepted
    drafted = tl.load(tokens + begin + next_row, mask=is_slot, other=0)
    emitted = tl.where(is_draft, drafted, bonus)
    kinds = tl.load(kind + begin + following, mask=is_slot, other=0)
    kinds = tl.where(is_draft, kinds, BONUS).to(tl.uint8)

    is_end = i < 0
    for e in range(num_eos_ids):
        is_end |= emitted == tl.load(eos_ids + e)
    first_end = tl.min(tl.where(is_end & is_slot & (i <= accepted), i, BLOCK), axis=0)
    has_end = first_end < BLOCK
    limit = tl.load(max_new)
    kept = tl.minimum(tl.where(has_end, first_end + 1, accepted + 1), limit - count)
    kept = tl.where(was_finished, 0, kept)

    # What stands behind the kept ones is overwritten by the next commit.
    offsets = sequence * width + count + i
    tl.store(out_ids + offsets, emitted, mask=is_slot)
    tl.store(out_kinds + offsets, kinds, mask=is_slot)
    if HAS_RELEVANCE:
        source = sequence * stride_relevance_sequence + row.to(tl.int64) * stride_relevance_slot
        predicted_by = tl.load(relevance + source, mask=is_slot, other=0.0).to(tl.float32)
        tl.store(out_relevance + offsets, predicted_by, mask=is_slot)
    last_row = tl.sum(tl.where(i == accepted, row, 0), axis=0)
    tl.store(last_two + 2 * sequence, tl.load(tokens + begin + last_row))
    tl.store(last_two + 2 * sequence + 1, bonus)

    used = tl.load(regret_used + sequence)
    used = tl.where(was_finished, used, used + tl.load(regret + sequence))
    is_finished = was_finished | has_end | (count + kept >= limit)
    tl.store(regret_used + sequence, used)
    tl.store(num_out + sequence, count + kept)
    tl.store(finished + sequence, is_finished.to(tl.uint8))
    # The rows of what is finished are never read again, and must not run out of the cache.
    length = tl.load(kv_len + sequence)
    tl.store(kv_len + sequence, tl.where(is_finished, length, length + accepted + 1))

    weights = tl.load(lse + begin + row, mask=is_slot, other=0.0)
    first_nan = tl.min(tl.where((weights != weights) & is_slot, i, BLOCK), axis=0)
    nan_row = tl.sum(tl.where(i == first_nan, row, 0), axis=0)
    nan_row = tl.where(first_nan < BLOCK, nan_row, NO_NAN)

    to = report + sequence * (HEAD + slots)
    tl.store(to, (count + kept).to(tl.int64))
    tl.store(to + 1, is_finished.to(tl.int64))
    tl.store(to + 2, nan_row.to(tl.int64))
    tl.store(to + 3, accepted.to(tl.int64))
    tl.store(to + 4, tl.load(num_slots + sequence).to(tl.int64))
    tl.store(to + 5, used.to(tl.float64).to(tl.int64, bitcast=True))
    tl.store(to + HEAD + i, emitted, mask=is_slot)


_LAUNCH = {"num_warps": 1, "num_stages": 1}


def append(
    out_ids: torch.Tensor,
    out_kinds: torch.Tensor,
    out_relevance: torch.Tensor,
    num_out: torch.Tensor,
    max_new: torch.Tensor,
    last_two: torch.Tensor,
    regret_used: torch.Tensor,
    finished: torch.Tensor,
    eos_ids: torch.Tensor,
    kv_len: torch.Tensor,
    tokens: torch.Tensor,
    num_slots: torch.Tensor,
    path: torch.Tensor,
    num_accepted: torch.Tensor,
    bonus_id: torch.Tensor,
    kind: torch.Tensor,
    regret: torch.Tensor,
    lse: torch.Tensor,
    relevance: torch.Tensor | None,
    head: int,
    bonus_kind: int,
    no_nan: int,
) -> torch.Tensor:
    """Launch `lvspec::append`."""
    batch_size, slots = tokens.shape
    report = torch.empty(batch_size, head + slots, dtype=torch.int64, device=tokens.device)
    scores = lse if relevance is None else relevance
    with launch.device_guard(tokens):
        append_kernel[(batch_size,)](
            out_ids=out_ids,
            out_kinds=out_kinds,
            out_relevance=out_relevance,
            num_out=num_out,
            max_new=max_new,
            last_two=last_two,
            regret_used=regret_used,
            finished=finished.view(torch.uint8),
            eos_ids=eos_ids,
            kv_len=kv_len,
            tokens=tokens.contiguous(),
            num_slots=num_slots.contiguous(),
            path=path.contiguous(),
            num_accepted=num_accepted,
            bonus_id=bonus_id,
            kind=kind.contiguous(),
            regret=regret,
            lse=lse.contiguous(),
            relevance=scores,
            report=report,
            slots=slots,
            width=out_ids.shape[1],
            num_eos_ids=eos_ids.shape[0],
            stride_relevance_sequence=scores.stride(0),
            stride_relevance_slot=scores.stride(1),
            HEAD=head,
            BONUS=bonus_kind,
            NO_NAN=no_nan,
            HAS_RELEVANCE=relevance is not None,
            BLOCK=triton.next_power_of_2(slots),
            **_LAUNCH,
        )
    return report
