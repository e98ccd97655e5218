"""Products of a few rows with weights of a byte each, without expanding them first."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lvspec.ops.backends import active_backend
from lvspec.ops.scaled_linear import MAX_ROWS, scaled_linear, takes_bytes

MAX_PACKED_ROWS = 16
"""Rows up to which torch's kernel was seen to be faster than expanding the weights."""

_Kernel = Literal["int8pack", "scaled_linear"]


class ByteLinear(nn.Linear):
    """A linear layer whose weights torchao holds as int8.

    torchao expands such weights for every product unless a compiler takes them together: more work
    than with plain weights, where a draft step has one row. These kernels do not expand them:
    lvspec's own, and torch's for bfloat16 on a CPU.
    """

    @classmethod
    def take_over(cls, layer: nn.Linear) -> None:
        """Make this class of a layer that torchao has quantised, where there is such a kernel."""
        weight = layer.weight
        is_known = (
            type(layer) is nn.Linear
            and all(hasattr(weight, name) for name in ("qdata", "scale", "act_quant_kwargs"))
            and weight.qdata.shape == weight.shape
            and weight.qdata.is_contiguous()
            and weight.scale.numel() == weight.shape[0]
            and weight.act_quant_kwargs is None
            and getattr(weight, "act_pre_scale", None) is None
        )
        if is_known and _kernel(weight, weight.dtype) is not None:
            layer.__class__ = cls

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        # Where a model was moved or converted since, torchao knows what to do.
        kernel = _kernel(weight, input.dtype) if input.device == weight.qdata.device else None
        most = MAX_PACKED_ROWS if kernel == "int8pack" else MAX_ROWS
        if kernel is None or input.numel() > most * input.shape[-1]:
            return super().forward(input)
        scale = weight.scale.reshape(-1)
        if kernel == "scaled_linear":
            return scaled_linear(input, weight.qdata, scale, self.bias)
        rows = input.reshape(-1, input.shape[-1])
        product = torch.ops.aten._weight_int8pack_mm(rows, weight.qdata, scale.to(input.dtype))
        if self.bias is not None:
            product = product + self.bias
        return product.view(*input.shape[:-1], -1)


def _kernel(weight: Any, dtype: torch.dtype) -> _Kernel | None:
    """What multiplies rows of a dtype with quantised weights of torchao's, where they are."""
    stored, device = weight.qdata.dtype, weight.qdata.device
    if stored != torch.int8:
        return None
    if device.type == "cpu" and dtype == torch.bfloat16 and active_backend("cpu") != "triton":
        return "int8pack"
    return "scaled_linear" if takes_bytes(stored, dtype, device) else None
