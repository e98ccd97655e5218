"""Sizes of linear layers with quantised weights, and random inputs of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class LinearCase:
    """One layer, and rows that it multiplies.

    Attributes:
        name: The layer, and of which model.
        outputs: N.
        size: K.
        rows: Rows of x.
        weights: "int8" or "fp8".
    """

    name: str
    outputs: int
    size: int
    rows: int
    weights: str

    def __str__(self) -> str:
        return f"{self.name}-n{self.outputs}-k{self.size}-m{self.rows}-{self.weights}"


_LAYERS = {
    "3b-o": (2048, 2048),
    "3b-up": (11008, 2048),
    "3b-down": (2048, 11008),
    "3b-head": (151936, 2048),
    "0.5b-o": (896, 896),
    "0.5b-up": (4864, 896),
    "0.5b-down": (896, 4864),
    "7b-up": (18944, 3584),
}
_SMALL = {"small": (64, 96), "odd": (37, 83)}


def linear_cases(which: str) -> list[LinearCase]:
    """Steps of a chain, and levels of trees; `which` is small, usual or full."""
    layers = _SMALL if which == "small" else _LAYERS
    rows = {"small": (1, 17), "usual": (1, 8), "full": (1, 2, 8, 16, 32, 64, 128)}[which]
    return [
        LinearCase(name, *sizes, count, weights)
        for weights in STORED
        for name, sizes in layers.items()
        for count in rows
    ]


class LinearInputs(NamedTuple):
    """Arguments of `lvspec::scaled_linear`; no layer of these has a bias but q, k and v."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    bias: None = None


def linear_inputs(case: LinearCase, device: torch.device, dtype: torch.dtype) -> LinearInputs:
    torch.manual_seed(sum(map(ord, str(case))))
    weight = torch.randn(case.outputs, case.size, dtype=dtype, device=device)
    numbers = weight * 30 if case.weights == "fp8" else (weight * 30).round().clamp(-128, 127)
    scale = (1 + torch.rand(case.outputs, device=device)) / (45 * case.size**0.5)
    x = torch.randn(1, case.rows, case.size, dtype=dtype, device=device)
    return LinearInputs(x, numbers.to(STORED[case.weights]), scale)


def linear_bytes(case: LinearCase, inputs: LinearInputs) -> int:
    """Weights, factors, x and the result."""
    read = sum(x.numel() * x.itemsize for x in inputs[:3])
    return read + case.rows * case.outputs * inputs.x.itemsize
