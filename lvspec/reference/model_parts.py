"""Small operations of HF's text models in plain PyTorch, rounded where HF's modules round.

Each stands in the place of several operations. All tensors of a call have one dtype, integers
excepted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows over their root mean square, times a weight.

    Computed in float32, whatever the dtype, and rounded to that of `x` before the weight is
    multiplied, as HF's modules do.

    Args:
        x: float `[..., H]`, strided views allowed.
        weight: `[H]`, the dtype of `x`.
        eps: Added to the mean of the squares.

    Returns:
        `[..., H]`, the dtype of `x`.
    """
    wide = x.float()
    mean = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(mean + eps)).to(x.dtype)


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, silu rounded to the dtype first; float tensors of one shape."""
    return functional.silu(gate) * up


def norm_linear(
    x: Tensor, norm_weight: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Rows times a matrix, behind their `rms_norm` if they have one.

    The normed rows are rounded to the dtype, as a module of their own would leave them; products
    are added in float32 (float64 for float64), the bias with them, and rounded once.

    Args:
        x: float `[R, I]`, strided views allowed.
        norm_weight: `[I]`, or None: the rows as they are.
        eps: As for `rms_norm`; without a norm of no meaning.
        weight: `[O, I]`, contiguous.
        bias: `[O]` or None.

    Returns:
        `[R, O]`, the dtype of `x`.
    """
    rows = x if norm_weight is None else rms_norm(x, norm_weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    product = rows.to(wide) @ weight.to(wide).T
    if bias is not None:
        product = product + bias.to(wide)
    return product.to(x.dtype)


def norm_gated_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    """The first half of a gated MLP: `silu_multiply` of two `norm_linear`, each rounded.

    Args:
        x, norm_weight, eps: As for `norm_linear`.
        weight: `[2 * M, I]`, contiguous: the gate's rows, then those of what it is multiplied by.

    Returns:
        `[R, M]`, the dtype of `x`.
    """
    gate, up = norm_linear(x, norm_weight, eps, weight, None).chunk(2, dim=-1)
    return silu_multiply(gate, up)


def linear_add_(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    """Add rows times a matrix to a residual, in place.

    The sum of products and residual is rounded once. HF's two operations round the product first,
    so that in 16 bits the last bit may be another.

    Args:
        x: float `[R, I]`, strided views allowed.
        weight: `[O, I]`, contiguous.
        residual: `[R, O]`, strided views allowed; it is written.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    residual.copy_(residual.to(wide) + x.to(wide) @ weight.to(wide).T)


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
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    layer: int,
    kv_len: Tensor,
) -> Tensor:
    """Turn queries and keys by their angles; keys and values go into rows `kv_len .. kv_len + S`.

    Rows that the cache does not have are not written; nothing else of it is touched.

    Args:
        qkv: float `[B, S, (Hq + 2 Hkv) * D]`: heads of queries, keys and values, as a product
            leaves them.
        cos, sin: `[B, S, D]`.
        q_norm, k_norm: `[D]`, weights of a `rms_norm` of each head before it is turned, or None:
            the head as it is.
        eps: As for `rms_norm`.
        k_cache, v_cache: `[L, B, Hkv, N, D]`, strided views allowed.
        layer: The layer that is written.
        kv_len: int32 `[B]`.

    Returns:
        The turned queries, `[B, Hq, S, D]`, contiguous.
    """
    num_slots, head_dim = cos.shape[1:]
    num_kv_heads = k_cache.shape[2]
    heads = qkv.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)

    def turned(x: Tensor, norm: Tensor | None) -> Tensor:
        x = x if norm is None else rms_norm(x, norm, eps)
        half = head_dim // 2
        other = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * cos[:, None] + other * sin[:, None]

    for cache, rows in ((k_cache, turned(k, k_norm)), (v_cache, v)):
        for sequence, length in enumerate(kv_len.tolist()):
            first, end = max(-length, 0), min(cache.shape[3] - length, num_slots)
            if first < end:
                new = rows[sequence, :, first:end]
                cache[layer, sequence, :, length + first : length + end] = new
    return turned(q, q_norm).contiguous()
