"""linear_add_: rows times a matrix, added to a residual in place.

Up to 16 rows are one launch of `few_rows`, more one product of PyTorch's with the residual as what
it adds to: either way the sum is rounded once. Specification: lvspec.reference.linear_add_.
"""

from __future__ import annotations

import torch

from lvspec.kernels.few_rows import MOST_ROWS, few_rows


def linear_add_(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> None:
    """Launch `lvspec::linear_add_`."""
    if x.shape[0] > MOST_ROWS:
        residual.addmm_(x, weight.T)
    else:
        few_rows(x, None, 0.0, weight, None, residual, adds=True)
