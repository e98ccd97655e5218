"""scaled_linear: a linear layer whose weights are bytes.

`lvspec.models.byte_linear` calls it with tensors of which it knows shapes and dtypes, so it has no
checked function.
"""

from __future__ import annotations

from torch import Tensor

from lvspec.ops.registry import define
from lvspec.reference import scaled_linear


def _shapes(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


define("scaled_linear", scaled_linear, _shapes)
