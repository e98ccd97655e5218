"""scaled_linear: a few rows times weights of 8 bits, which are read as they are.

Reads / writes: every weight and factor once for each tile of rows, which are 32 at most; x once for
each BLOCK_N weight rows, from L2; the result once. Grid: tiles of rows along x, so that programs
which share weights run together, and blocks of weight rows along y. The warps of a program take
parts of K, and their sums are added in one order. So there are many programs where there are few
weight rows, none waits for long chains of products, and a result is the same whatever the other
rows are. All int8 and e4m3 numbers are exact in bfloat16 and float16, which the tensor cores take.
Specification: lvspec.reference.scaled_linear.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.rounding import rounded


@triton.jit
def scaled_linear_kernel(
    x,
    weight,
    scale,
    bias,
    y,
    rows,
    outputs,
    size,
    x_stride_row,
    x_stride_column,
    HAS_BIAS: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    is_row, is_output = m < rows, n < outputs
    from_x = x + m.to(tl.int64)[None, :, None] * x_stride_row
    from_weight = weight + n.to(tl.int64)[None, :, None] * size

    sums = tl.zeros((PARTS, BLOCK_N, BLOCK_M), dtype=tl.float32)
    for begin in range(0, size, PARTS * BLOCK_K):
        column = begin + k[:, None, :]
        is_column = column < size
        is_weight = is_column & is_output[None, :, None]
        weights = tl.load(from_weight + column, mask=is_weight, other=0.0)
        from_column = from_x + column.to(tl.int64) * x_stride_column
        values = tl.load(from_column, mask=is_column & is_row[None, :, None], other=0.0)
        if IS_FLOAT8:  # by way of types for which every chip with float8 has fast instructions
            weights = weights.to(tl.float16).to(tl.float32)
        if DOT_IN_FLOAT32:
            values = values.to(tl.float32)
        weights, values = weights.to(values.dtype), tl.permute(values, (0, 2, 1))
        sums = tl.dot(weights, values, sums, input_precision="ieee")

    factors = tl.load(scale + n, mask=is_output, other=0.0).to(tl.float32)
    total = tl.sum(sums, axis=0) * factors[:, None]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=is_output, other=0.0).to(tl.float32)[:, None]
    offsets = m.to(tl.int64)[None, :] * outputs + n[:, None]
    total = rounded(total, y.dtype.element_ty)
    tl.store(y + offsets, total, mask=is_output[:, None] & is_row[None, :])


_PARTS = 4
"""Parts of K, each of which a warp multiplies."""

_LAUNCH = {
    # num_stages by rows of a tile. A stage is 512 bytes of a weight row and 1024 of a row of x; all
    # but one are on their way. A program of 16 weight rows fetches 24 KiB of weights ahead on sm90:
    # about what keeps a multiprocessor's share of the bandwidth busy.
    "sm80": {8: 4, 16: 4, 32: 3},
    "sm90": {8: 4, 16: 4, 32: 4},
    "sm100": {8: 5, 16: 4, 32: 4},
}

_FEW_OUTPUTS = 4096
"""Weight rows up to which tiles of 16 are needed for a program on every multiprocessor."""


def scaled_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Launch `lvspec::scaled_linear`."""
    outputs, size = weight.shape
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    rows = x.reshape(-1, size)
    is_wide = x.dtype == torch.float32
    block_m = 16 if is_wide else min(max(triton.next_power_of_2(rows.shape[0]), 8), 32)
    block_n = 16 if is_wide or outputs <= _FEW_OUTPUTS else 32
    grid = (triton.cdiv(rows.shape[0], block_m), triton.cdiv(outputs, block_n))
    with launch.device_guard(x):
        scaled_linear_kernel[grid](
            x=rows,
            weight=weight,
            scale=scale.contiguous(),
            bias=None if bias is None else bias.contiguous(),
            y=y,
            rows=rows.shape[0],
            outputs=outputs,
            size=size,
            x_stride_row=rows.stride(0),
            x_stride_column=rows.stride(1),
            HAS_BIAS=bias is not None,
            IS_FLOAT8=weight.dtype != torch.int8,
            DOT_IN_FLOAT32=launch.INTERPRETED and x.dtype == torch.bfloat16,
            PARTS=_PARTS,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=64 if is_wide else 128,
            num_warps=_PARTS,
            num_stages=_LAUNCH[launch.device_class(x.device)][block_m],
        )
    return y
