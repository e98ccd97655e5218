"""Linear layers whose weights are float8, a byte each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lvspec.ops.scaled_linear import MAX_ROWS, scaled_linear, takes_bytes
from lvspec.reference.float8 import FLOAT8, to_float8

TILE_BYTES = 64 << 20
"""Of expanded weights at a time."""


class Float8Linear(nn.Linear):
    """A linear layer of float8_e4m3fn weights with a factor a row; activations stay as they are.

    Factors are powers of two, so the weights that it stands for are exact in float32, bfloat16 and,
    unless a row is all tiny, float16: it computes what a plain layer of those would. A few rows are
    multiplied by `ops.scaled_linear`, which reads the bytes; for more rows some weights at a time
    are expanded, for torch's product.

    Attributes:
        weight: float8_e4m3fn `[O, I]`.
        scale: float32 `[O]`.
        bias: As it was, or None.
    """

    scale: nn.Parameter

    @classmethod
    @torch.no_grad()
    def take_over(cls, layer: nn.Linear) -> None:
        """Make this class of a plain layer, whose own weights are given up."""
        weight = layer.weight
        numbers = torch.empty(weight.shape, dtype=FLOAT8, device=weight.device)
        scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
        for rows in _tiles(weight, 4):
            numbers[rows], scale[rows] = to_float8(weight[rows], dim=1)
        layer.weight = nn.Parameter(numbers, requires_grad=False)
        layer.scale = nn.Parameter(scale, requires_grad=False)
        layer.__class__ = cls

    def expanded(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """The weights of some rows as numbers of a float dtype, `[rows, I]`."""
        return self.weight[rows].to(dtype) * self.scale[rows, None].to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        is_few = input.numel() <= MAX_ROWS * input.shape[-1]
        if is_few and takes_bytes(weight.dtype, input.dtype, weight.device):
            return scaled_linear(input, weight, self.scale, self.bias)
        parts = [
            nn.functional.linear(
                input,
                self.expanded(input.dtype, rows),
                None if self.bias is None else self.bias[rows],
            )
            for rows in _tiles(weight, input.element_size())
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        """Of a conversion to another dtype only the bias takes part."""
        kept = {name: getattr(self, name).detach() for name in ("weight", "scale")}
        super()._apply(fn, recurse)
        for name, then in kept.items():
            now = getattr(self, name)
            if now.dtype != then.dtype:
                now.data = then.to(now.device)
        return self


def _tiles(weight: Tensor, size: int) -> list[slice]:
    """Rows of a matrix that together are no more than `TILE_BYTES`, of numbers of `size` bytes."""
    count, step = weight.shape[0], max(1, TILE_BYTES // (weight.shape[1] * size))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]
