"""The operations of `kernels/`, for CUDA devices, or Triton's interpreter.

Linear layers are called as they are, whatever they are: a quantised layer is one too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lvspec.models.fused.operations import Angles, Operations
from lvspec.ops import float_dtypes


class TritonOperations(Operations):
    """Triton, on devices of one type."""

    def __init__(self, device_type: str) -> None:
        self.dtypes = float_dtypes(device_type)
        self._device_type = device_type

    def takes_device(self, device: torch.device) -> bool:
        return device.type == self._device_type

    def takes_layer(self, layer: Any) -> bool:
        weight = getattr(layer, "weight", None)
        return (
            isinstance(layer, nn.Module)
            and isinstance(getattr(layer, "in_features", None), int)
            and isinstance(getattr(layer, "out_features", None), int)
            and isinstance(weight, Tensor)
            and weight.dtype in self.dtypes
            and self.takes_device(weight.device)
        )

    def takes_rows(self, x: Tensor, weight: Tensor, size: int) -> bool:
        return x.dtype == weight.dtype and x.shape[-1] == size

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.ops.lvspec.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.lvspec.add_rms_norm(x, residual, weight, eps)

    def gated_mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp.down_proj(torch.ops.lvspec.silu_multiply(mlp.gate_proj(x), mlp.up_proj(x)))

    def rotary_forwards(self, rotary: nn.Module) -> Iterator[Callable[..., Angles]]:
        half = rotary.inv_freq.shape[0]
        sections = getattr(rotary, "mrope_section", None)
        if sections is None:
            yield self._rotary_forward([0] * half, rotary)
            return
        if not isinstance(sections, list) or not all(isinstance(size, int) for size in sections):
            return
        # One dimension behind the other, as in Qwen2-VL; or in turns, as in Qwen3-VL.
        in_sections = [i % 3 for i, size in enumerate(sections) for _ in range(size)]
        if len(in_sections) == half:
            yield self._rotary_forward(in_sections, rotary)
        if len(sections) == 3:
            in_turns = [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(half)]
            yield self._rotary_forward(in_turns, rotary)

    def _rotary_forward(self, dimensions: list[int], rotary: nn.Module) -> Callable[..., Angles]:
        table = torch.tensor(dimensions, dtype=torch.int32, device=rotary.inv_freq.device)
        rows = 3 if hasattr(rotary, "mrope_section") else 1

        def forward(module: nn.Module, x: Tensor, position_ids: Tensor) -> Angles:
            positions = position_ids[None] if rows == 1 else position_ids
            is_plain = positions.dim() == 3 and positions.shape[0] == rows
            if x.dtype not in self.dtypes or positions.dtype != torch.int64 or not is_plain:
                return type(module).forward(module, x, position_ids)
            return torch.ops.lvspec.rotary_angles(
                positions, module.inv_freq, table, module.attention_scaling, x.dtype
            )

        return forward

    def rotate_and_write(self, *arguments: Any) -> Tensor:
        return torch.ops.lvspec.rotate_and_write(*arguments)
