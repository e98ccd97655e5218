"""How an operation becomes `torch.ops.lvspec.<name>`, and who computes it where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lvspec.ops import triton_backend
from lvspec.ops.backends import REQUESTED
from lvspec.ops.signature import Signature

# Kept for the life of the process: the registrations go when it is collected.
_LIBRARY = torch.library.Library("lvspec", "DEF")

OPERATIONS: list[str] = []
"""The names of all operations."""


def define(
    name: str,
    specification: Callable[..., Any],
    shapes: Callable[..., Any],
    *,
    written: tuple[str, ...] = (),
    scratch: bool = False,
) -> None:
    """Define an operation by its specification, and register who computes it.

    The specification does on every device (CompositeExplicitAutograd, to which all fall back). What
    registers itself for CPU or CUDA takes precedence there: Triton's kernels here, the C++ when its
    library is loaded, see `lvspec.ops.backends`.

    Args:
        name: Of the operation, and of its launcher in `lvspec.kernels`.
        specification: The function of `lvspec.reference`, or one like it. Its signature is the
            schema, see `lvspec.ops.signature`.
        shapes: Returns empty tensors like the results; names those arguments that it looks at.
        written: The tensors that are changed in place.
        scratch: Whether the operation takes a `workspace` behind the specification's arguments:
            uint8 of one dimension, or None.
    """
    signature = Signature(specification)
    _LIBRARY.define(name + signature.schema(written, scratch), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, signature.call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lvspec::{name}", signature.select(shapes), lib=_LIBRARY)
    if REQUESTED in (None, "triton"):
        triton_backend.register(_LIBRARY, name, "CUDA")
    if REQUESTED == "triton":
        triton_backend.register(_LIBRARY, name, "CPU")
    if REQUESTED == "cpp":
        triton_backend.refuse(_LIBRARY, name, "CUDA")
    OPERATIONS.append(name)
