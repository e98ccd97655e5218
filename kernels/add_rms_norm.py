"""add_rms_norm: the sum of two tensors, and its rows over their root mean square, times a weight.

Reads / writes: both tensors, their sum and the result once; the weight once a row, from L2. Grid:
one program a row, along x. Specification: lvspec.reference.add_rms_norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.rms_norm import normalized, row_config
from lvspec.kernels.rounding import rounded


@triton.jit
def add_rms_norm_kernel(
    x,
    residual,
    weight,
    total,
    y,
    size,
    eps,
    x_stride_row,
    x_stride_column,
    residual_stride_row,
    residual_stride_column,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    wide = columns.to(tl.int64)
    factors = tl.load(weight + columns, mask=mask, other=0.0)
    old = tl.load(
        residual + row * residual_stride_row + wide * residual_stride_column, mask=mask, other=0.0
    )
    new = tl.load(x + row * x_stride_row + wide * x_stride_column, mask=mask, other=0.0)
    added = rounded(old.to(tl.float32) + new.to(tl.float32), new.dtype)
    tl.store(total + row * size + columns, added, mask=mask)
    result = normalized(added.to(tl.float32), factors, size, eps)
    tl.store(y + row * size + columns, result, mask=mask)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `lvspec::add_rms_norm`."""
    size = x.shape[-1]
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, residual_rows = x.reshape(-1, size), residual.reshape(-1, size)
    with launch.device_guard(x):
        add_rms_norm_kernel[(rows.shape[0],)](
            x=rows,
            residual=residual_rows,
            weight=weight,
            total=total,
            y=y,
            size=size,
            eps=eps,
            x_stride_row=rows.stride(0),
            x_stride_column=rows.stride(1),
            residual_stride_row=residual_rows.stride(0),
            residual_stride_column=residual_rows.stride(1),
            **row_config(size),
        )
    return total, y
