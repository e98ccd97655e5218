"""Who computes: the backends there are, the one asked for, and why another is not available."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch

VARIABLE = "LVSPEC_BACKEND"

_REFERENCE_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KERNEL_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    """One entry of `backends()`."""

    available: bool
    reason: str  # why it is not available, or on what it computes

    def __bool__(self) -> bool:
        return self.available


def backends() -> dict[str, Backend]:
    """Every backend by name, whether it can be used here, and why not."""
    return {"reference": Backend(True, "PyTorch, any device"), "cpp": _cpp(), "triton": _triton()}


def requested_backend() -> str | None:
    """The backend that LVSPEC_BACKEND asks for, or None.

    Raises:
        ValueError: There is no backend of that name.
        RuntimeError: It is not available here. Nothing else is used in its place.
    """
    name = os.environ.get(VARIABLE, "").strip().lower()
    if name in ("", "auto"):
        return None
    known = backends()
    if name not in known:
        raise ValueError(f"{VARIABLE}: expected one of auto, {', '.join(known)}, got {name!r}")
    if not known[name]:
        raise RuntimeError(
            f"{VARIABLE}={name}, but that backend is not available: {known[name].reason}"
        )
    return name


def active_backend(device_type: str) -> str:
    """Name of the backend that computes on tensors of a device type, such as "cuda"."""
    if REQUESTED is not None:
        return REQUESTED
    return "triton" if device_type == "cuda" else "reference"


def float_dtypes(device_type: str) -> tuple[torch.dtype, ...]:
    """Types of logits, queries and caches that the active backend of a device type takes."""
    is_reference = active_backend(device_type) == "reference"
    return _REFERENCE_FLOATS if is_reference else _KERNEL_FLOATS


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _cpp() -> Backend:
    return Backend(False, "this version of lvspec has no C++ operations")


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "triton is not installed: pip install 'triton>=3.6'")
    if triton_is_interpreted():
        return Backend(True, "Triton's interpreter (TRITON_INTERPRET=1): any device, slow")
    if torch.cuda.is_available():
        return Backend(True, "CUDA devices")
    return Backend(False, "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)")


REQUESTED = requested_backend()
"""What LVSPEC_BACKEND asked for when `lvspec.ops` was imported; an impossible request fails here,
not at the first call."""
