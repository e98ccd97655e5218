"""verify_attention: attention of the draft slots, and how much of it falls on video."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lvspec.reference.split_plan import VIDEO, SplitPlan


class VerifyAttention(NamedTuple):
    """What `verify_attention` returns; float32 (float64 for float64 input) but for `out`."""

    out: torch.Tensor  # [B, Hq, S, D], in q's dtype
    lse: torch.Tensor  # [B, Hq, S], natural logarithm of the softmax denominator
    visual_mass: torch.Tensor | None  # [B, Hq, S], softmax mass on video; None without scores
    visual_peak: torch.Tensor | None  # [B, Hq, S], largest weight on one video position; likewise


def verify_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    visual: torch.Tensor,
    *,
    scale: float | None = None,
    block_table: torch.Tensor | None = None,
    plan: SplitPlan | None = None,
    scores: bool = True,
) -> VerifyAttention:
    """Attention of S draft slots, each over the committed cache and its own ancestors.

    Row t of sequence b attends to the positions `< kv_len[b]` and to `kv_len[b] + j` for every bit
    j of `ancestors[b, t]` with `j < S`. What stands at `kv_len[b] + S` or later has no effect, not
    even a NaN. A row that attends to nothing has out 0, lse -inf, mass 0 and peak 0. Sums are taken
    in float32 (float64 for float64).

    Worked example (one head, D = 1, scale 1, `kv_len` = 2, position 0 is video, S = 2)::

        k = [ln 2, 0, 0, ln 4]   v = [1, 2, 3, 4]   q = [1, 1]   ancestors = [0b01, 0b11]
        row 0: weights [2, 1, 1] / 4     out 7/4    lse ln 4   mass 1/2   peak 1/2
        row 1: weights [2, 1, 1, 4] / 8  out 23/8   lse ln 8   mass 1/4   peak 1/4

    Args:
        q: float16, bfloat16, float32 or float64 `[B, Hq, S, D]`, `1 <= S <= 64`. Query head h uses
            KV head `h // (Hq // Hkv)`.
        k_cache: `[B, Hkv, N, D]` in q's dtype, strided views allowed; with `block_table`
            `[pages, Hkv, page_size, D]`.
        v_cache: Like `k_cache`.
        kv_len: int32 `[B]`, committed tokens; the K/V of slot t stand at position `kv_len[b] + t`.
        ancestors: int64 `[B, S]`, bit j of entry t set iff slot j is t or an ancestor of t.
        visual: uint8 `[B, N]`, nonzero where the cached position is a video token.
        scale: Factor of the scores, default `D ** -0.5`.
        block_table: int32 `[B, max_pages]`, the page of every `page_size` positions; N is then
            `max_pages * page_size`. Entries behind the last page in use are not followed and may be
            anything.
        plan: Pieces from `plan_splits`. The result is the same up to rounding; whether a position
            is video is then read from the plan, for which everything behind the prompt is text.
        scores: Whether to return `visual_mass` and `visual_peak`.

    Returns:
        VerifyAttention.
    """
    batch_size, num_q_heads, num_slots, head_dim = q.shape
    if block_table is not None:
        k_cache, v_cache = _gather_pages(k_cache, block_table), _gather_pages(v_cache, block_table)
    if batch_size and not kv_len.is_cuda:
        # The host can read this for nothing, and what no row can see is left out.
        in_use = int(kv_len.max()) + num_slots
        k_cache, v_cache = k_cache[:, :, :in_use], v_cache[:, :, :in_use]
    num_kv_heads, length = k_cache.shape[1:3]
    group = num_q_heads // num_kv_heads
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32

    # The slot at each position and its bit, [B, N]. A position is hidden from a row if the row has
    # not its bit. Committed positions and those behind the tree have none (0): the comparison with
    # 1 rather than 0 lets every row see the former, and the latter stay hidden.
    slot = torch.arange(length, device=q.device) - kv_len[:, None]
    committed, unused = slot < 0, slot >= num_slots
    bit = torch.ones_like(slot) << slot.clamp(0, num_slots - 1)
    bit.masked_fill_(committed | unused, 0)
    hidden = (ancestors[:, :, None] & bit[:, None]) == committed[:, None]  # [B, S, N]

    # The query heads of a KV head are rows of one matrix product: K and V are not repeated.
    rows = q.reshape(batch_size, num_kv_heads, group * num_slots, head_dim).to(dtype)
    rows = rows * (head_dim**-0.5 if scale is None else scale)
    logits = torch.matmul(rows, k_cache.to(dtype).transpose(-1, -2))
    by_head = logits.view(batch_size, num_kv_heads, group, num_slots, length)
    by_head.masked_fill_(hidden[:, None, None], -math.inf)
    values = v_cache.to(dtype)
    if batch_size > 1 or kv_len.is_cuda:
        # A weight of 0 does not silence a NaN. (One sequence on the CPU has nothing behind it.)
        values = values.masked_fill(unused[:, None, :, None], 0)

    is_video = visual[:, None, None, :length] != 0
    if plan is None:
        out, lse, mass, peak = _softmax(logits, values, is_video, scores)
    else:
        out, lse, mass, peak = _softmax_by_pieces(logits, values, kv_len, plan)
    shape = (batch_size, num_q_heads, num_slots)
    return VerifyAttention(
        out.reshape(*shape, head_dim).to(q.dtype),
        lse.reshape(shape),
        mass.reshape(shape) if scores and mass is not None else None,
        peak.reshape(shape) if scores and peak is not None else None,
    )


_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _softmax(
    logits: torch.Tensor, values: torch.Tensor, is_video: torch.Tensor, scores: bool
) -> _Parts:
    """Output, lse, mass and peak of `logits` `[B, Hkv, rows, N]`, which it overwrites."""
    tiny = torch.finfo(logits.dtype)
    # Finite, so that a row without any position gives exp(-inf) = 0 rather than exp(-inf + inf).
    peak_logit = logits.amax(-1, keepdim=True).clamp_(min=tiny.min)
    weights = logits.sub_(peak_logit).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = peak_logit + total.log()
    weights.div_(total.clamp_(min=tiny.tiny))
    out = torch.matmul(weights, values)
    if not scores:
        return out, lse, None, None
    on_video = weights.mul_(is_video)
    return out, lse, on_video.sum(-1), on_video.amax(-1)


def _softmax_by_pieces(
    logits: torch.Tensor, values: torch.Tensor, kv_len: torch.Tensor, plan: SplitPlan
) -> _Parts:
    """The same from the maximum and sum of every piece, merged as a split-KV kernel merges them."""
    batch_size, length = logits.shape[0], logits.shape[-1]
    position = torch.arange(length, device=logits.device)
    committed = kv_len[:, None]
    pieces = [
        (start[:, None], torch.minimum(end[:, None], committed), kind[:, None])
        for start, end, kind in zip(plan.start.unbind(1), plan.end.unbind(1), plan.kind.unbind(1))
    ]
    pieces.append(
        (committed, torch.full_like(committed, length), torch.zeros_like(committed))
    )  # the tree

    maxima, sums, outputs, kinds = [], [], [], []
    for start, end, kind in pieces:
        inside = ((position >= start) & (position < end) & (kind >= 0)).view(
            batch_size, 1, 1, length
        )
        piece = logits.masked_fill(~inside, -math.inf)
        maximum = piece.amax(-1, keepdim=True)
        weights = (piece - maximum.clamp(min=torch.finfo(piece.dtype).min)).exp()
        maxima.append(maximum)
        sums.append(weights.sum(-1, keepdim=True))
        outputs.append(torch.matmul(weights, values))
        kinds.append((kind == VIDEO).view(batch_size, 1, 1, 1))

    highest = torch.stack(maxima).amax(0).clamp(min=torch.finfo(logits.dtype).min)
    lse = (
        highest
        + sum(total * (maximum - highest).exp() for maximum, total in zip(maxima, sums)).log()
    )
    finite_lse = lse.masked_fill(
        lse == -math.inf, 0
    )  # an empty row: every share below is exp(-inf) = 0
    shares = [(maximum - finite_lse).exp() for maximum in maxima]
    out = sum(output * share for output, share in zip(outputs, shares))
    on_video = [share * is_video for share, is_video in zip(shares, kinds)]
    mass = sum(total * share for total, share in zip(sums, on_video))
    return out, lse, mass, torch.stack(on_video).amax(0)


def _gather_pages(pages: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """Pages `[pages, Hkv, page_size, D]` as a cache `[B, Hkv, max_pages * page_size, D]`."""
    batch_size, max_pages = block_table.shape
    num_kv_heads, page_size, head_dim = pages.shape[1:]
    chosen = pages[
        block_table.long().clamp(0, pages.shape[0] - 1)
    ]  # [B, max_pages, Hkv, page_size, D]
    return chosen.transpose(1, 2).reshape(batch_size, num_kv_heads, max_pages * page_size, head_dim)
