"""silu_multiply: silu(gate) * up, the middle of a gated MLP.

Reads / writes: both operands and the result once. Grid: one program a block of values, along x.
Specification: lvspec.reference.silu_multiply.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lvspec.kernels import launch
from lvspec.kernels.rounding import rounded


@triton.jit
def silu_multiply_kernel(gate, up, y, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    gates = tl.load(gate + offsets, mask=mask, other=0.0)
    ups = tl.load(up + offsets, mask=mask, other=0.0)
    wide = gates.to(tl.float32)
    # Rounded before it is multiplied, as by two operations.
    silu = rounded(wide / (1.0 + tl.exp(-wide)), gates.dtype)
    product = rounded(silu.to(tl.float32) * ups.to(tl.float32), gates.dtype)
    tl.store(y + offsets, product, mask=mask)


# 8 values a thread: one row of a 7B model's MLP is 19 programs, and loads are of 16 bytes.
_LAUNCH = {"block": 1024, "num_warps": 4, "num_stages": 1}


def silu_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Launch `lvspec::silu_multiply`."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    with launch.device_guard(gate):
        silu_multiply_kernel[(triton.cdiv(gate.numel(), _LAUNCH["block"]),)](
            gate=gate,
            up=up,
            y=y,
            count=gate.numel(),
            BLOCK=_LAUNCH["block"],
            num_warps=_LAUNCH["num_warps"],
            num_stages=_LAUNCH["num_stages"],
        )
    return y
