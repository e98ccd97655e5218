"""Who computes: the backends there are, the one asked for, and why another is not available."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch

from lvspec.ops import cpp_backend

VARIABLE = "LVSPEC_BACKEND"

_ALL_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TRITON_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
    if device_type == "cuda":
        return "triton"
    return "cpp" if device_type == "cpu" and _CPP_PROBLEM is None else "reference"


def float_dtypes(device_type: str) -> tuple[torch.dtype, ...]:
    """Types of logits, queries and caches that the active backend of a device type takes."""
    return _TRITON_FLOATS if active_backend(device_type) == "triton" else _ALL_FLOATS


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _cpp() -> Backend:
    if _CPP_PROBLEM is not None:
        return Backend(False, _CPP_PROBLEM)
    return Backend(True, "CPU")


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "triton is not installed: pip install 'triton>=3.6'")
    if triton_is_interpreted():
        return Backend(True, "Triton's interpreter (TRITON_INTERPRET=1): any device, slow")
    if torch.cuda.is_available():
        return Backend(True, "CUDA devices")
    return Backend(False, "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)")


_CPP_PROBLEM = cpp_backend.why_missing()

REQUESTED = requested_backend()
"""What LVSPEC_BACKEND asked for when `lvspec.ops` was imported; an impossible request fails here,
not at the first call."""

if REQUESTED in (None, "cpp") and _CPP_PROBLEM is None:
    _CPP_PROBLEM = cpp_backend.load()
    if REQUESTED == "cpp" and _CPP_PROBLEM is not None:
        raise RuntimeError(f"{VARIABLE}=cpp, but that backend is not available: {_CPP_PROBLEM}")
