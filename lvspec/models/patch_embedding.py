"""Patches of a video as what they are, rows of a product.

The towers of Qwen's families embed patches by a convolution whose stride is its kernel, over
patches that lie apart already. On a CPU that takes several times as long as the product that it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional


@contextmanager
def patches_multiplied(model: nn.Module) -> Iterator[None]:
    """A context in which convolutions of a model on a CPU that see one place are products."""
    found = [module for module in model.modules() if _is_plain(module)]
    for convolution in found:
        vars(convolution)["forward"] = _Product(convolution)
    try:
        yield
    finally:
        for convolution in found:
            del vars(convolution)["forward"]


class _Product:
    """`nn.Conv3d.forward` of one module."""

    def __init__(self, convolution: nn.Conv3d) -> None:
        self._convolution, self._theirs = convolution, convolution.forward

    def __call__(self, patches: Tensor) -> Tensor:
        weight, bias = self._convolution.weight, self._convolution.bias
        if patches.dim() != 5 or patches.shape[1:] != weight.shape[1:]:
            return self._theirs(patches)
        rows = functional.linear(patches.flatten(1), weight.flatten(1), bias)
        return rows[..., None, None, None]


def _is_plain(module: nn.Module) -> bool:
    if type(module) is not nn.Conv3d or "forward" in vars(module):
        return False
    weight = module.weight
    return (
        module.groups == 1
        and math.prod(module.dilation) == 1
        and module.padding == (0, 0, 0)
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
    )
