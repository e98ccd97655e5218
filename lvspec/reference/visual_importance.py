"""visual_importance: which video positions the given queries look at."""

from __future__ import annotations

import math

import torch


def visual_importance(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    kv_len: torch.Tensor,
    visual: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention that each cached video position receives, summed over the query rows and heads.

    `sum over h, t of exp(scale * q[b, h, t] . k[b, n] - lse[b, h, t])` at the video positions `n <
    kv_len[b]`, 0 elsewhere. Rows with lse -inf add nothing. The query rows must come after the
    video they score: there is no causal mask. Used at prefill to keep the video tokens that matter
    for the draft, as in SpecVLM.

    Worked example (one head, D = 1, scale 1, `kv_len` = 3, `visual` = [1, 0, 1, 1])::

        k = [ln 2, 0, 0, 0]   q = [1]   lse = [ln 4]   ->   [2/4, 0, 1/4, 0]

    Args:
        q: float `[B, Hq, R, D]`, the query rows that score.
        k_cache: `[B, Hkv, N, D]` in q's dtype, strided views allowed.
        kv_len: int32 `[B]`.
        visual: uint8 `[B, N]`, nonzero where the cached position is a video token.
        lse: float32 (float64 for float64 input) `[B, Hq, R]` of those rows' own attention.
        scale: Factor of the scores, default `D ** -0.5`.

    Returns:
        float32 (float64 for float64 input) `[B, N]`.
    """
    batch_size, num_q_heads, num_rows, head_dim = q.shape
    num_kv_heads, capacity = k_cache.shape[1:3]
    group_rows = num_q_heads // num_kv_heads * num_rows
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.reshape(batch_size, num_kv_heads, group_rows, head_dim).to(dtype)
    rows = rows * (head_dim**-0.5 if scale is None else scale)
    logits = torch.matmul(rows, k_cache.to(dtype).transpose(-1, -2))
    lse = lse.reshape(batch_size, num_kv_heads, group_rows, 1).to(dtype)
    empty = lse == -math.inf
    counted = (visual != 0) & (torch.arange(capacity, device=q.device) < kv_len[:, None])
    weights = (logits - lse.masked_fill(empty, 0)).exp().masked_fill(empty, 0)
    return weights.sum((1, 2)).masked_fill(~counted, 0)
