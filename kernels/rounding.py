"""Rounding of float32 to what a tensor holds, to nearest even, in the interpreter too."""

from __future__ import annotations

import triton
import triton.language as tl

from lvspec.kernels import launch

_INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 `values` as `dtype`. Triton's interpreter cuts the bits of bfloat16 off instead."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = values.to(dtype)
    return result


@triton.jit
def rounded_to_float8(values):
    """float32 `values` as e4m3, the largest in the place of larger ones.

    Triton's interpreter loses what a mantissa carries into the exponent.
    """
    # NaN stays: a comparison with it is false.
    values = tl.where(values > 448.0, 448.0, values)
    values = tl.where(values < -448.0, -448.0, values)
    if _INTERPRETED:
        bits = values.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        code = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
        code = code - 960  # the exponent's bias is 7 in the place of 127
        small = magnitude.to(tl.float32, bitcast=True) * 512.0 + 12582912.0  # to an integer
        denormal = small.to(tl.uint32, bitcast=True) - 0x4B400000
        code = tl.where(magnitude < 0x3C800000, denormal, code)  # 2 ** -6
        code = tl.where(magnitude > 0x7F800000, 0x7F, code)
        result = (code | (bits >> 24 & 0x80)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        result = values.to(tl.float8e4nv)
    return result
