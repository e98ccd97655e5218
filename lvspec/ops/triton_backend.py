"""The Triton kernels as implementations of `torch.ops.lvspec.*`.

`lvspec.kernels` and with it triton are imported at the first call, not with `lvspec.ops`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from lvspec.ops.backends import VARIABLE, triton_is_interpreted


def register(library: torch.library.Library, name: str, key: str) -> None:
    """Compute an operation with `lvspec.kernels.<name>.<name>` on tensors of dispatch key `key`."""
    library.impl(name, _launcher(name, key), key)


def refuse(library: torch.library.Library, name: str, key: str) -> None:
    """Raise for tensors of dispatch key `key`, for which the backend that was asked for is none."""

    def refused(*arguments: Any) -> Any:
        raise RuntimeError(
            f"lvspec.ops: expected tensors on the CPU, as {VARIABLE} asks for, got {key} tensors"
        )

    library.impl(name, refused, key)


def _launcher(name: str, key: str) -> Callable[..., Any]:
    loaded: list[Callable[..., Any]] = []

    def launch(*arguments: Any) -> Any:
        if not loaded:
            loaded.append(_load(name, key))
        return loaded[0](*arguments)

    return launch


def _load(name: str, key: str) -> Callable[..., Any]:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"lvspec.ops.{name} on a CUDA device needs triton, which is not installed: "
            "pip install 'triton>=3.6' (Linux, x86_64 or aarch64). LVSPEC_BACKEND=reference "
            "computes with PyTorch instead, slowly."
        )
    if key == "CPU" and not triton_is_interpreted():
        raise RuntimeError(
            f"lvspec.ops.{name}: expected tensors on a CUDA device, as {VARIABLE}=triton asks for, "
            "got tensors on the CPU (TRITON_INTERPRET=1 runs the kernels there, slowly)"
        )
    return getattr(importlib.import_module(f"lvspec.kernels.{name}"), name)
