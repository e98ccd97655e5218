"""rotary_angles: cosines and sines of positions in several dimensions, times frequencies.

Reads / writes: `4 * B * S * D` results' bytes in float32, half of that in 16 bits, and the tables
once a slot, from L2. Grid: one program a sequence and slot, along x. Specification:
lvspec.reference.rotary_angles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.rounding import rounded

_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
_HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def _cos_and_sin(angles):
    """Of float32 that count in positions: 1e6 is the end of a very long video.

    Polynomials of Cephes' cosf and sinf between -pi / 4 and pi / 4, to which float64 reduces an
    angle exactly enough. CUDA's cosf keeps memory of every thread for large ones: 32 bytes of stack
    as triton 3.6 compiles it.
    """
    wide = angles.to(tl.float64)
    turns = tl.floor(wide * _TWO_OVER_PI + 0.5)
    rest = (wide - turns * _HALF_PI).to(tl.float32)
    quadrant = turns.to(tl.int64) & 3
    z = rest * rest
    sin = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * rest + rest
    cos = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z
    cos += 1.0 - 0.5 * z
    is_odd = (quadrant & 1) == 1
    cosines = tl.where(is_odd, sin, cos)
    sines = tl.where(is_odd, cos, sin)
    cosines = tl.where((quadrant == 1) | (quadrant == 2), -cosines, cosines)
    return cosines, tl.where(quadrant >= 2, -sines, sines)


@triton.jit
def rotary_angles_kernel(
    positions,
    frequencies,
    dimensions,
    cos,
    sin,
    num_slots,
    half,
    scaling,
    positions_stride_dimension,
    positions_stride_batch,
    positions_stride_slot,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sequence, slot = row // num_slots, row % num_slots
    columns = tl.arange(0, BLOCK)
    mask = columns < half
    dimension = tl.load(dimensions + columns, mask=mask, other=0).to(tl.int64)
    frequency = tl.load(frequencies + columns, mask=mask, other=0.0)
    positions += sequence * positions_stride_batch + slot * positions_stride_slot
    position = tl.load(positions + dimension * positions_stride_dimension, mask=mask, other=0)
    cosines, sines = _cos_and_sin(position.to(tl.float32) * frequency)
    cosines = rounded(cosines * scaling, cos.dtype.element_ty)
    sines = rounded(sines * scaling, sin.dtype.element_ty)
    offsets = row * 2 * half + columns
    tl.store(cos + offsets, cosines, mask=mask)
    tl.store(cos + offsets + half, cosines, mask=mask)
    tl.store(sin + offsets, sines, mask=mask)
    tl.store(sin + offsets + half, sines, mask=mask)


_LAUNCH = {"num_warps": 1, "num_stages": 1}


def rotary_angles(
    positions: torch.Tensor,
    frequencies: torch.Tensor,
    dimensions: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `lvspec::rotary_angles`."""
    _, batch_size, num_slots = positions.shape
    half = frequencies.shape[0]
    shape = (batch_size, num_slots, 2 * half)
    cos = torch.empty(shape, dtype=dtype, device=positions.device)
    sin = torch.empty(shape, dtype=dtype, device=positions.device)
    with launch.device_guard(positions):
        rotary_angles_kernel[(batch_size * num_slots,)](
            positions=positions,
            frequencies=frequencies,
            dimensions=dimensions,
            cos=cos,
            sin=sin,
            num_slots=num_slots,
            half=half,
            scaling=scaling,
            positions_stride_dimension=positions.stride(0),
            positions_stride_batch=positions.stride(1),
            positions_stride_slot=positions.stride(2),
            BLOCK=triton.next_power_of_2(half),
            **_LAUNCH,
        )
    return cos, sin
