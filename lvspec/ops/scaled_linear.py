"""Schema and shape function of `scaled_linear`. `lvspec.byte_linear` calls it with tensors of which
it knows shapes and dtypes, so it has no checked function in `lvspec.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec.reference.scaled_linear import scaled_linear

SCHEMA = "(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor"


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def register(library: torch.library.Library) -> None:
    """Define the operation, for all devices by its specification."""
    library.define("scaled_linear" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("scaled_linear", scaled_linear, "CompositeExplicitAutograd")
    torch.library.register_fake("lvspec::scaled_linear", _fake, lib=library)
