"""Small operations of HF's text models in plain PyTorch, rounded where HF's modules round.

rms_norm, add_rms_norm, silu_multiply, rotary_angles and rotate_and_write: what `models/fused` puts
in the place of several operations each. All tensors of a call have one dtype but for integers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows over their root mean square, times a weight.

    Computed in float32 (float64 for float64) and rounded to the dtype of `x` before the weight is
    multiplied.

    Args:
        x: float `[..., H]`, strided views allowed.
        weight: `[H]`, the dtype of `x`.
        eps: Added to the mean of the squares.

    Returns:
        `[..., H]`, the dtype of `x`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(mean + eps)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`residual + x` and its `rms_norm`.

    Args:
        x, residual: float `[..., H]`.
        weight, eps: As for `rms_norm`.

    Returns:
        (sum, norm), both `[..., H]`.
    """
    total = residual + x
    return total, rms_norm(total, weight, eps)


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, silu rounded to the dtype first; float tensors of one shape."""
    return functional.silu(gate) * up


def rotary_angles(
    positions: Tensor, frequencies: Tensor, dimensions: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions; both halves of a row are the same.

    Args:
        positions: int64 `[R, B, S]`.
        frequencies: float32 `[D / 2]`.
        dimensions: int32 `[D / 2]`, which of the R positions a frequency multiplies.
        scaling: What cosines and sines are multiplied by.
        dtype: Of the results.

    Returns:
        (cos, sin), each `[B, S, D]`.
    """
    angles = positions[dimensions.long()].permute(1, 2, 0).float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layer: int,
    kv_len: Tensor,
) -> Tensor:
    """Turn queries and keys by their angles; keys and values go into rows `kv_len .. kv_len + S`.

    Rows that the cache does not have are not written; nothing else of it is touched.

    Args:
        q: float `[B, S, Hq * D]`, as a projection leaves it.
        k, v: `[B, S, Hkv * D]`.
        cos, sin: `[B, S, D]`.
        k_cache, v_cache: `[L, B, Hkv, N, D]`, strided views allowed.
        layer: The layer that is written.
        kv_len: int32 `[B]`.

    Returns:
        The turned queries, `[B, Hq, S, D]`, contiguous.
    """
    batch_size, num_slots, head_dim = cos.shape

    def heads(x: Tensor) -> Tensor:
        return x.view(batch_size, num_slots, -1, head_dim).transpose(1, 2)

    def turned(x: Tensor) -> Tensor:
        half = head_dim // 2
        other = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * cos[:, None] + other * sin[:, None]

    for cache, rows in ((k_cache, turned(heads(k))), (v_cache, heads(v))):
        for sequence, length in enumerate(kv_len.tolist()):
            first, end = max(-length, 0), min(cache.shape[3] - length, num_slots)
            if first < end:
                new = rows[sequence, :, first:end]
                cache[layer, sequence, :, length + first : length + end] = new
    return turned(heads(q)).contiguous()
