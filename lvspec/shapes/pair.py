"""The embedded pair as it ships."""

from __future__ import annotations

from pathlib import Path

import torch

from lvspec.models.loading import Pair, load_pair

TARGET = Path(__file__).parent / "target"
DRAFT = Path(__file__).parent / "draft"


def load_embedded_pair(
    *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Pair:
    """The trained target and draft of this package; the weights are stored in float16."""
    return load_pair(TARGET, DRAFT, dtype=dtype, device=device)
