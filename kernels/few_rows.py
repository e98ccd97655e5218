"""Up to 16 rows times a matrix, with a norm before and a gate or a residual behind it.

`norm_linear`, `norm_gated_linear` and `linear_add_` launch this kernel where rows are few; then the
weights are all that takes time, and what other kernels would do stands beside their way.

Reads / writes: every weight once; x once for each BLOCK_N weight rows, from L2, and with a norm
once more for the mean squares; a residual and the result once. Grid: blocks of weight rows, along
x. The warps of a program take parts of K, and their sums are added in one order, so that a result
is the same whatever the other rows are. A program takes as many rows of a gate as of what it is
multiplied by, in turns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.launch import request, wait_for_kernels_ahead
from lvspec.kernels.rounding import rounded

MOST_ROWS = 16
"""Rows of a tile, of which there is one. With more of them products are worth cuBLAS's tiles."""

NORMED_ROWS = 8
"""Rows that every program may norm for itself: they are read from L2 once more for every BLOCK_N
weight rows, which for 16 rows is as much as half of the weights."""


@triton.jit
def _row_scales(
    x, rows, size, eps, x_stride_row, x_stride_column, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """One over the root mean square of ROWS rows."""
    m, k = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    from_x = x + m.to(tl.int64)[:, None] * x_stride_row
    squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for begin in tl.range(0, size, BLOCK, num_stages=4):
        column = (begin + k)[None, :]
        is_value = (m < rows)[:, None] & (column < size)
        offset = column.to(tl.int64) * x_stride_column
        values = tl.load(from_x + offset, mask=is_value, other=0.0).to(tl.float32)
        squares += values * values
    return tl.rsqrt(tl.sum(squares, axis=1) / size + eps)


@triton.jit
def few_rows_kernel(
    # inputs
    x,
    norm_weight,
    weight,
    bias,
    # output, or the residual
    y,
    # sizes
    rows,
    outputs,
    size,
    eps,
    # strides
    x_stride_row,
    x_stride_column,
    y_stride_row,
    y_stride_column,
    # flags
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,  # weight has `outputs` rows of a gate, then as many more
    ADDS: tl.constexpr,  # to y
    DOT_IN_FLOAT32: tl.constexpr,
    DEPENDENT: tl.constexpr,
    # tiles
    PARTS: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    NORM_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINE: tl.constexpr,  # weights of a line of L2, 128 bytes
):
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = m < rows
    if GATED:
        is_output = n // 2 < outputs
        n = n % 2 * outputs + n // 2
    else:
        is_output = n < outputs
    k = tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    from_x = x + m.to(tl.int64)[None, :, None] * x_stride_row
    from_weight = weight + n.to(tl.int64)[None, :, None] * size
    dtype = y.dtype.element_ty

    if DEPENDENT:  # the weights of the first turn are on their way before the rows are there
        line = tl.minimum(tl.arange(0, PARTS * BLOCK_K // LINE) * LINE, size - 1)
        first = tl.where(is_output, n, 0).to(tl.int64) * size
        request(weight + first[:, None] + line[None, :])
        wait_for_kernels_ahead()
    if HAS_NORM:
        scales = _row_scales(
            x, rows, size, eps, x_stride_row, x_stride_column, NORM_ROWS, NORM_BLOCK
        )
        scales = tl.broadcast_to(scales, (BLOCK_M,))
    sums = tl.zeros((PARTS, BLOCK_N, BLOCK_M), dtype=tl.float32)
    for begin in range(0, size, PARTS * BLOCK_K):
        column = begin + k[:, None, :]
        is_column = column < size
        is_weight = is_column & is_output[None, :, None]
        weights = tl.load(from_weight + column, mask=is_weight, other=0.0)
        from_column = from_x + column.to(tl.int64) * x_stride_column
        values = tl.load(from_column, mask=is_column & is_row[None, :, None], other=0.0)
        if HAS_NORM:  # rounded twice, as by a kernel of its own
            factors = tl.load(norm_weight + column, mask=is_column, other=0.0).to(tl.float32)
            values = rounded(values.to(tl.float32) * scales[None, :, None], dtype)
            values = rounded(values.to(tl.float32) * factors, dtype)
        if DOT_IN_FLOAT32:
            weights, values = weights.to(tl.float32), values.to(tl.float32)
        sums = tl.dot(weights, tl.permute(values, (0, 2, 1)), sums, input_precision="ieee")

    total = tl.sum(sums, axis=0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=is_output, other=0.0).to(tl.float32)[:, None]
    if GATED:
        pairs = tl.reshape(total, (BLOCK_N // 2, 2, BLOCK_M))
        gate, up = tl.split(tl.permute(pairs, (0, 2, 1)))
        gate, up = rounded(gate, dtype).to(tl.float32), rounded(up, dtype).to(tl.float32)
        total = rounded(gate / (1.0 + tl.exp(-gate)), dtype).to(tl.float32) * up
        n = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        is_output = n < outputs
    offsets = m.to(tl.int64)[None, :] * y_stride_row + n.to(tl.int64)[:, None] * y_stride_column
    is_result = is_output[:, None] & is_row[None, :]
    if ADDS:
        total += tl.load(y + offsets, mask=is_result, other=0.0).to(tl.float32)
    tl.store(y + offsets, rounded(total, dtype), mask=is_result)


_PARTS = 4
"""Parts of K, each of which a warp multiplies."""

_LAUNCH = {
    # num_stages by weight rows of a program; all but one are on their way. A stage is 512 bytes of
    # each of its weight rows and of each row of x. Where a program is all that a multiprocessor
    # has, as with 16 rows, it fetches 40 KiB of weights ahead.
    "sm80": {16: 6, 32: 4},
    "sm90": {16: 6, 32: 4},
    "sm100": {16: 6, 32: 4},
}

_FEW_OUTPUTS = 4096
"""Weight rows up to which tiles of 16 are needed for a program on every multiprocessor."""

_NORMED_AT_ONCE = 4096
"""Values that are squared at a time: a row of most models."""


def few_rows(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    gated: bool = False,
    adds: bool = False,
) -> None:
    """Launch `few_rows_kernel`; x has 1 to `MOST_ROWS` rows, and y the result's shape."""
    (rows, size), outputs = x.shape, weight.shape[0]
    is_wide = x.dtype == torch.float32
    block_m = 16 if is_wide or rows > 8 else 8
    block_n = 16 if is_wide or outputs <= _FEW_OUTPUTS else 32
    norm_rows = 1 if rows == 1 else block_m
    num_stages = 4 if is_wide else _LAUNCH[launch.device_class(x.device)][block_n]
    with launch.device_guard(x):
        few_rows_kernel[(triton.cdiv(outputs, block_n),)](
            x=x,
            norm_weight=norm_weight,
            weight=weight,
            bias=bias,
            y=y,
            rows=rows,
            outputs=y.shape[1],
            size=size,
            eps=eps,
            x_stride_row=x.stride(0),
            x_stride_column=x.stride(1),
            y_stride_row=y.stride(0),
            y_stride_column=y.stride(1),
            HAS_NORM=norm_weight is not None,
            HAS_BIAS=bias is not None,
            GATED=gated,
            ADDS=adds,
            DOT_IN_FLOAT32=launch.INTERPRETED and x.dtype == torch.bfloat16,
            DEPENDENT=launch.DEPENDENT,
            PARTS=_PARTS,
            NORM_ROWS=norm_rows,
            NORM_BLOCK=_NORMED_AT_ONCE // norm_rows,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=32 if is_wide else 64,
            LINE=128 // x.element_size(),
            num_warps=_PARTS,
            num_stages=num_stages,
            launch_pdl=launch.DEPENDENT,
        )
