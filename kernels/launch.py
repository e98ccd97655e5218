"""What every launcher needs: the class of the device, its guard, and memory for partial results.

A kernel's entry points are named `*_kernel` and launched as `name_kernel[grid](argument=value)`,
with `num_warps` and `num_stages` from the file's `_LAUNCH` table, which has a row for every device
class where they differ. `bench/budget.py` keeps these launches, on tensors without data, and
compiles exactly what was launched.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""

DEPENDENT = False
"""Whether kernels of a pass are launched before the one ahead has ended (programmatic dependent
launch, compute capability 9.0 or more). Off: no device has timed it."""

DEVICE_CLASSES = ("sm80", "sm90", "sm100")
"""What launch tables distinguish. sm80 stands for every chip that is not a data-centre Hopper or
Blackwell; its tiles fit the 99 KiB of shared memory that the smallest of them have."""


@triton.jit
def wait_for_kernels_ahead():
    """What they write is there afterwards; the kernel behind may be launched, to wait in its turn.

    Every program of a kernel that is launched early calls it before it reads or writes anything
    but weights: so one that has ended has seen the end of all that were launched before it.
    """
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def request(pointers):
    """Have the lines at these addresses brought into L2, all of which must be those of tensors."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def device_class(device: torch.device) -> str:
    """The row of a launch table for this device; the interpreter takes Hopper's."""
    if device.type != "cuda":
        return "sm90"
    return _class_of_cuda(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _class_of_cuda(index: int) -> str:
    major, _ = torch.cuda.get_device_capability(index)
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def carve(
    workspace: torch.Tensor | None,
    device: torch.device,
    *parts: tuple[tuple[int, ...], torch.dtype],
) -> list[torch.Tensor]:
    """Tensors of the given shapes and dtypes one behind the other in `workspace` (uint8), each at a
    multiple of 16 bytes; without a workspace in memory of their own."""
    sizes = [_padded(math.prod(shape) * dtype.itemsize) for shape, dtype in parts]
    if workspace is None:
        workspace = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    pieces, begin = [], 0
    for (shape, dtype), size in zip(parts, sizes):
        length = math.prod(shape) * dtype.itemsize
        pieces.append(workspace[begin : begin + length].view(dtype).view(shape))
        begin += size
    return pieces


def _padded(size: int) -> int:
    return -(-size // 16) * 16
