"""Numbers as float8_e4m3fn and a factor, in plain PyTorch.

Factors are powers of two: multiplying by one rounds nothing, and as the type is a float the largest
number need not become the type's largest for the others to be as exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of the type, which has no infinities."""


def float8_scale(x: Tensor, dim: int | tuple[int, ...], headroom: float = 1.0) -> Tensor:
    """The factor of those numbers that are along `dim`.

    Args:
        x: float, any shape.
        dim: Dimensions of which all numbers share one factor; they are left out of the result.
        headroom: How much larger than the largest number here another may be, >= 1.

    Returns:
        float32: the smallest power of two by which `headroom` times the largest number is divided
        to at most `LARGEST`; 1 where all are zero or one is not finite.
    """
    largest = x.abs().amax(dim).float() * headroom / LARGEST
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2 ** exponent, 0.5 <= mantissa
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where(largest.isfinite() & (largest > 0), scale, torch.ones_like(scale))


def narrow_to_float8(x: Tensor, scale: Tensor) -> Tensor:
    """`x / scale` rounded to float8_e4m3fn; what is larger than its largest becomes that.

    NaN stays, and infinities become the largest.

    Args:
        x: float, any shape.
        scale: float, a shape that broadcasts to it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) / scale.to(wide)).clamp(-LARGEST, LARGEST).to(FLOAT8)


def write_float8(
    keys: Tensor,
    values: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layer: int,
    kv_len: Tensor,
) -> None:
    """Keys and values go into rows `kv_len .. kv_len + S` of a float8 cache, see
    `narrow_to_float8`.

    Rows that the cache does not have are not written; nothing else of it is touched.

    Args:
        keys, values: float `[B, Hkv, S, D]`, strided views allowed.
        k_scale, v_scale: float32 `[L, B, Hkv]`, contiguous: the factor of every head.
        k_cache, v_cache: float8_e4m3fn `[L, B, Hkv, N, D]`, strided views allowed; the layer of
            both is written.
        layer: Which.
        kv_len: int32 `[B]`.
    """
    num_slots = keys.shape[2]
    for cache, rows, scale in ((k_cache, keys, k_scale), (v_cache, values, v_scale)):
        numbers = narrow_to_float8(rows, scale[layer, :, :, None, None])
        for sequence, length in enumerate(kv_len.tolist()):
            first, end = max(-length, 0), min(cache.shape[3] - length, num_slots)
            if first < end:
                new = numbers[sequence, :, first:end]
                cache[layer, sequence, :, length + first : length + end] = new


def to_float8(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(numbers, factors) of `x`, one factor for all that is along `dim`."""
    scale = float8_scale(x, dim)
    return narrow_to_float8(x, scale.unsqueeze(dim)), scale
