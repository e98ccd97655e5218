"""Products of a few rows with int8 weights, without expanding them first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_ROWS = 16
"""Rows up to which torch's kernel was seen to be faster than expanding the weights."""


class Int8Linear(nn.Linear):
    """A linear layer whose weights torchao holds as int8, for bfloat16 on a CPU.

    torchao expands such weights for every product unless a compiler takes them together: more work
    than with plain weights, where a draft step has one row. torch has a kernel that does not expand
    them, fast for bfloat16.
    """

    @classmethod
    def take_over(cls, layer: nn.Linear) -> None:
        """Make this class of a layer that torchao has quantised, where the kernel is fast."""
        weight = layer.weight
        names = ("qdata", "scale", "act_quant_kwargs", "act_pre_scale")
        is_known = type(layer) is nn.Linear and all(hasattr(weight, name) for name in names)
        if (
            is_known
            and weight.device.type == "cpu"
            and weight.dtype == torch.bfloat16
            and weight.qdata.dtype == torch.int8
            and weight.scale.numel() == weight.shape[0]
            and weight.act_quant_kwargs is None
            and weight.act_pre_scale is None
        ):
            layer.__class__ = cls

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        weight = self.weight
        # Where a model was moved or converted since, torchao knows what to do.
        is_packed = input.device.type == "cpu" and input.dtype == torch.bfloat16
        if not is_packed or rows.shape[0] > MAX_ROWS or weight.qdata.device.type != "cpu":
            return super().forward(input)
        scale = weight.scale.reshape(-1).to(input.dtype)
        product = torch.ops.aten._weight_int8pack_mm(rows, weight.qdata, scale)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*input.shape[:-1], -1)
