"""verify_attention: attention of the draft slots, and how much of it falls on video."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lvspec.reference.split_plan import PADDING, TEXT, VIDEO, SplitPlan


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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
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
        k_cache: `[B, Hkv, N, D]` in q's dtype or float8_e4m3fn, strided views allowed; with
            `block_table` `[pages, Hkv, page_size, D]`.
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
        k_scale: float32 `[Hkv]`, or `[B, Hkv]` for factors of every sequence's own, by which every
            number of `k_cache` is multiplied. Needed for a float8 cache; None is 1.
        v_scale: The same for `v_cache`.
        scores: Whether to return `visual_mass` and `visual_peak`.

    Returns:
        VerifyAttention.
    """
    batch_size, num_q_heads, num_slots, head_dim = q.shape
    if block_table is not None:
        k_cache, v_cache = _gather_pages(k_cache, block_table), _gather_pages(v_cache, block_table)
    num_kv_heads, capacity = k_cache.shape[1:3]
    group = num_q_heads // num_kv_heads
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32

    # The query heads of a KV head are rows of one matrix product: K and V are not repeated.
    rows = q.reshape(batch_size, num_kv_heads, group * num_slots, head_dim).to(dtype)
    rows = rows * (head_dim**-0.5 if scale is None else scale)
    slots = torch.arange(num_slots, device=q.device)
    hidden = ((ancestors[:, :, None] >> slots) & 1) == 0  # [B, row, slot]

    parts = []
    for sequence, length in enumerate(kv_len.tolist()):
        end = min(length + num_slots, capacity)
        keys = k_cache[sequence, :, :end].to(dtype)
        values = v_cache[sequence, :, :end].to(dtype)
        if k_scale is not None:
            keys = keys * _of_heads(k_scale, sequence)
        if v_scale is not None:
            values = values * _of_heads(v_scale, sequence)
        logits = torch.bmm(rows[sequence], keys.transpose(1, 2))  # [Hkv, group * S, end]
        on_tree = logits.view(num_kv_heads, group, num_slots, end)[..., length:]
        on_tree.masked_fill_(hidden[sequence, :, : end - length], -math.inf)
        if plan is None:
            parts.append(_softmax(logits, values, visual[sequence, :end], scores))
        else:
            pieces = _pieces_in_use(plan, sequence, length, end)
            parts.append(_softmax_by_pieces(logits, values, pieces))

    out, lse, mass, peak = zip(*parts)
    shape = q.shape[:3]
    return VerifyAttention(
        _joined(out, q.shape).to(q.dtype),
        _joined(lse, shape),
        _joined(mass, shape) if scores else None,
        _joined(peak, shape) if scores else None,
    )


_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _softmax(
    logits: torch.Tensor, values: torch.Tensor, visual: torch.Tensor, scores: bool
) -> _Parts:
    """Output, lse, mass and peak of `logits` `[Hkv, rows, positions]`, which it overwrites."""
    limits = torch.finfo(logits.dtype)
    # Finite, so that a row without any position gives exp(-inf) = 0 rather than exp(-inf + inf).
    maximum = logits.amax(-1, keepdim=True).clamp_(min=limits.min)
    weights = logits.sub_(maximum).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = maximum + total.log()
    weights.div_(total.clamp_(min=limits.tiny))
    out = torch.bmm(weights, values)
    if not scores:
        return out, lse, None, None
    on_video = weights.mul_((visual != 0).to(weights.dtype))
    return out, lse, on_video.sum(-1), on_video.amax(-1)


def _of_heads(scale: torch.Tensor, sequence: int) -> torch.Tensor:
    """Factors of a sequence's heads, `[Hkv, 1, 1]`."""
    return (scale if scale.dim() == 1 else scale[sequence])[:, None, None]


def _softmax_by_pieces(
    logits: torch.Tensor, values: torch.Tensor, pieces: list[tuple[int, int, int]]
) -> _Parts:
    """The same from the maximum and sum of every piece, merged as a split-KV kernel merges them."""
    lowest = torch.finfo(logits.dtype).min
    maxima, totals, outputs = [], [], []
    for start, end, _ in pieces:
        piece = logits[..., start:end]
        maximum = piece.amax(-1, keepdim=True)
        weights = (piece - maximum.clamp(min=lowest)).exp()
        maxima.append(maximum)
        totals.append(weights.sum(-1, keepdim=True))
        outputs.append(torch.bmm(weights, values[:, start:end]))

    highest = torch.stack(maxima).amax(0).clamp_(min=lowest)
    total = torch.zeros_like(highest)
    for piece_maximum, piece_total in zip(maxima, totals):
        total += piece_total * (piece_maximum - highest).exp()
    lse = highest + total.log()

    subtracted = lse.masked_fill(lse == -math.inf, 0)  # a row without any position has weights 0
    out = torch.zeros_like(outputs[0])
    mass, peak = torch.zeros_like(lse), torch.zeros_like(lse)
    for (_, _, kind), maximum, total, output in zip(pieces, maxima, totals, outputs):
        share = (maximum - subtracted).exp()
        out += output * share
        if kind == VIDEO:
            mass += total * share
            peak = torch.maximum(peak, share)
    return out, lse, mass, peak


def _pieces_in_use(
    plan: SplitPlan, sequence: int, kv_len: int, end: int
) -> list[tuple[int, int, int]]:
    """Start, end and kind of a sequence's pieces that hold a position, the tree being the last."""
    table = zip(*(column[sequence].tolist() for column in plan))
    pieces = [(start, min(stop, kv_len), kind) for start, stop, kind in table if kind != PADDING]
    pieces.append((kv_len, end, TEXT))
    return [piece for piece in pieces if piece[0] < piece[1]]


def _joined(parts: tuple[torch.Tensor, ...], shape: torch.Size) -> torch.Tensor:
    """One part a sequence, as one tensor; a single part is not copied."""
    return (parts[0] if len(parts) == 1 else torch.stack(parts)).view(shape)


def _gather_pages(pages: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """Pages `[pages, Hkv, page_size, D]` as a cache `[B, Hkv, max_pages * page_size, D]`."""
    batch_size, max_pages = block_table.shape
    num_kv_heads, page_size, head_dim = pages.shape[1:]
    chosen = pages[block_table.long().clamp(0, pages.shape[0] - 1)]
    chosen = chosen.transpose(1, 2)  # [B, Hkv, max_pages, page_size, D]
    return chosen.reshape(batch_size, num_kv_heads, max_pages * page_size, head_dim)
