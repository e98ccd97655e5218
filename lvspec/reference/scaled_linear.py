"""Products with weights of a byte each, and a factor a row, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`(x @ weight.T) * scale + bias`, the sums in float32 (float64 for float64), rounded once.

    Args:
        x: float `[..., K]`, strided views allowed.
        weight: int8 or float8_e4m3fn `[N, K]`, contiguous.
        scale: float `[N]`, what the numbers of a weight row are multiplied by.
        bias: float `[N]` or None.

    Returns:
        `[..., N]`, the dtype of `x`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    product = x.to(dtype) @ weight.to(dtype).T * scale.to(dtype)
    if bias is not None:
        product = product + bias.to(dtype)
    return product.to(x.dtype)
