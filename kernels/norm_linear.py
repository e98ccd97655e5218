"""norm_linear: rows times a matrix, behind their norm if they have one.

Up to 16 rows are one launch of `few_rows`, which norms up to 8 itself; more are normed by
`rms_norm`, and more than 16 are multiplied by PyTorch. Specification: lvspec.reference.norm_linear.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from lvspec.kernels.few_rows import MOST_ROWS, NORMED_ROWS, few_rows
from lvspec.kernels.rms_norm import rms_norm


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Launch `lvspec::norm_linear`."""
    if norm_weight is not None and x.shape[0] > NORMED_ROWS:
        x, norm_weight = rms_norm(x, norm_weight, eps), None
    if x.shape[0] > MOST_ROWS:
        return functional.linear(x, weight, bias)
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    few_rows(x, norm_weight, eps, weight, bias, y)
    return y
