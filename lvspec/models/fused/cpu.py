"""The operations of `csrc/`, for float32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvspec.models.fused.operations import Angles, Operations
from lvspec.ops import active_backend
from lvspec.ops.cpp_backend import instruction_set

MAX_ROWS = {"avx512": 128, "avx2": 40, "portable": 4}
"""Rows up to which csrc/linear.h was seen to be faster than torch, by instruction set."""


@cache
def max_rows() -> int:
    """Of a product that csrc/linear.h computes; 0 where it is not there."""
    return MAX_ROWS[instruction_set()] if active_backend("cpu") == "cpp" else 0


class CpuOperations(Operations):
    """C++, products of a few rows included, for which the libraries are not made."""

    dtypes = (torch.float32,)

    def takes_device(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def takes_layer(self, layer: Any) -> bool:
        return type(layer) is nn.Linear and self.takes_weight(layer.weight, 2)

    def takes_rows(self, x: Tensor, weight: Tensor, size: int) -> bool:
        return x.dtype == torch.float32 and x.dim() == 3 and x.shape[-1] == size

    def linear(self, layer: nn.Module) -> Callable | None:
        has_bias = getattr(layer, "bias", None) is not None
        if not self.takes_layer(layer) or (has_bias and not self.takes_weight(layer.bias, 1)):
            return None

        def forward(module: nn.Module, input: Tensor) -> Tensor:
            few = self.takes_rows(input, module.weight, module.in_features)
            if not few or _count(input) > max_rows():
                return nn.Linear.forward(module, input)
            return torch.ops.lvspec.cpu_linear(input, module.weight, module.bias)

        return forward

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.ops.lvspec.cpu_rms_norm(x, weight, eps)

    def gated_mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
        if _count(x) <= max_rows():
            hidden = torch.ops.lvspec.cpu_gated_linear(x, gate, up)
        else:
            products = functional.linear(x, gate), functional.linear(x, up)
            hidden = torch.ops.lvspec.cpu_silu_multiply(*products)
        return mlp.down_proj(hidden)

    def rotary_forwards(self, rotary: nn.Module) -> Iterator[Callable[..., Angles]]:
        sections = getattr(rotary, "mrope_section", None)
        if not isinstance(sections, list) or sum(sections) != rotary.inv_freq.shape[0]:
            return
        table = torch.tensor(sections)

        def forward(module: nn.Module, x: Tensor, position_ids: Tensor) -> Angles:
            is_plain = position_ids.dtype == torch.int64 and position_ids.shape[0] == 3
            if x.dtype != torch.float32 or position_ids.dim() != 3 or not is_plain:
                return type(module).forward(module, x, position_ids)
            return torch.ops.lvspec.cpu_rotary_angles(
                position_ids, module.inv_freq, table, module.attention_scaling
            )

        yield forward

    def rotate_and_write(self, *arguments: Any) -> Tensor:
        return torch.ops.lvspec.cpu_rotate_and_write(*arguments)


def _count(x: Tensor) -> int:
    """Rows of `[B, S, size]`."""
    return x.shape[0] * x.shape[1]
