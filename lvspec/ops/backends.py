"""Who computes: the backends there are, the one asked for, and why another is not available."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

VARIABLE = "LVSPEC_BACKEND"


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


def _cpp() -> Backend:
    return Backend(False, "this version of lvspec has no C++ operations")


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "triton is not installed")
    return Backend(False, "this version of lvspec has no Triton operations")
