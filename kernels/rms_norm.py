"""rms_norm: rows over their root mean square, times a weight.

Reads / writes: every row and its result once; the weight once a row, from L2. Grid: one program a
row, along x. Specification: lvspec.reference.rms_norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.rounding import rounded


@triton.jit
def normalized(values, weight, size, eps):
    """Of a row in float32, in the type of the weight, to which the first product is rounded too."""
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
    first = rounded(values * scale, weight.dtype)
    return rounded(first.to(tl.float32) * weight.to(tl.float32), weight.dtype)


@triton.jit
def rms_norm_kernel(
    x,
    weight,
    y,
    size,
    eps,
    x_stride_row,
    x_stride_column,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    # Requested before the row is worked on.
    factors = tl.load(weight + columns, mask=mask, other=0.0)
    offsets = row * x_stride_row + columns.to(tl.int64) * x_stride_column
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * size + columns, normalized(values, factors, size, eps), mask=mask)


# A program holds a row in registers: 16 values a thread, loaded 16 bytes at a time.
_LAUNCH = {"values_per_warp": 512, "num_stages": 1}


def row_config(size: int) -> dict[str, int]:
    """`BLOCK`, `num_warps` and `num_stages` for rows of `size` values."""
    block = triton.next_power_of_2(size)
    num_warps = min(max(block // _LAUNCH["values_per_warp"], 1), 16)
    return {"BLOCK": block, "num_warps": num_warps, "num_stages": _LAUNCH["num_stages"]}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Launch `lvspec::rms_norm`."""
    size = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.reshape(-1, size)
    with launch.device_guard(x):
        rms_norm_kernel[(rows.shape[0],)](
            x=rows,
            weight=weight,
            y=y,
            size=size,
            eps=eps,
            x_stride_row=rows.stride(0),
            x_stride_column=rows.stride(1),
            **row_config(size),
        )
    return y
