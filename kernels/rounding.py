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
