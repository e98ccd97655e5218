"""scaled_linear: a linear layer whose weights are bytes.

`lvspec.models` calls it with tensors of which it knows shapes and dtypes, so nothing is checked.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lvspec import reference
from lvspec.ops.backends import active_backend, float_dtypes
from lvspec.ops.registry import define

MAX_ROWS = 128
"""Rows up to which products are lvspec's: behind it weights are read so often that those of the
libraries with expanded weights are the better ones (by the bytes that each moves, on CUDA; no GPU
was there to measure)."""


def scaled_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The specification in float64, which only that computes in."""
    if x.dtype == torch.float64:
        return reference.scaled_linear(x, weight, scale, bias)
    return torch.ops.lvspec.scaled_linear(x, weight, scale, bias)


def takes_bytes(stored: torch.dtype, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the backend of a device reads weights of a dtype as they are, for rows of another."""
    if active_backend(device.type) != "triton":
        return active_backend(device.type) == "cpp" and dtype != torch.float64
    is_converted = stored != torch.float8_e4m3fn or converts_from_float8(device)
    return is_converted and dtype in float_dtypes(device.type)


@functools.cache
def converts_from_float8(device: torch.device) -> bool:
    """Whether Triton has the conversion there; its interpreter has."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _shapes(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


define("scaled_linear", reference.scaled_linear, _shapes)
