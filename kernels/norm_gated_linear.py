"""norm_gated_linear: the first half of a gated MLP.

Up to 16 rows are one launch of `few_rows`, which norms up to 8 itself; more are normed by
`rms_norm`, and more than 16 are multiplied by PyTorch, whose product `silu_multiply` reads.
Specification: lvspec.reference.norm_gated_linear.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from lvspec.kernels.few_rows import MOST_ROWS, NORMED_ROWS, few_rows
from lvspec.kernels.rms_norm import rms_norm
from lvspec.kernels.silu_multiply import silu_multiply


def norm_gated_linear(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor
) -> torch.Tensor:
    """Launch `lvspec::norm_gated_linear`."""
    factors: torch.Tensor | None = norm_weight
    if x.shape[0] > NORMED_ROWS:
        x, factors = rms_norm(x, norm_weight, eps), None
    if x.shape[0] > MOST_ROWS:
        return silu_multiply(*functional.linear(x, weight).chunk(2, dim=-1))
    y = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=x.device)
    few_rows(x, factors, eps, weight, None, y, gated=True)
    return y
