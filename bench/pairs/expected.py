"""What `limits.py --predict` has written down of a pair, for runs to be compared with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PREDICTIONS = Path(__file__).parents[1] / "results" / "predictions.json"


def prediction(pair: str, gamma: int, path: Path | None = None) -> dict[str, Any] | None:
    """Its row of that pair and gamma, whatever the context; None: there is none."""
    path = PREDICTIONS if path is None else path
    document = json.loads(path.read_text()) if path.exists() else {"gamma": None, "rows": []}
    if document["gamma"] != gamma:
        return None
    return next((row for row in document["rows"] if row["pair"] == pair), None)


def other_parts(
    found: Mapping[str, Mapping[str, int]], expected: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """Where something stands in for more or fewer parts of a model than was predicted.

    Args:
        found: As `DecodeStats.parts`; a role that it does not have is not compared.
        expected: The same of a prediction.
    """
    return [
        f"{role}: expected {expected[role]} parts, got {dict(parts)}"
        for role, parts in found.items()
        if dict(parts) != expected[role]
    ]


def kernels_a_layer(
    kernels: Iterable[Mapping[str, Any]], iterations: int, layer_passes: int
) -> dict[str, float]:
    """How often every kernel of a profile runs in one decoder layer of one pass, on average.

    Args:
        kernels: `gaps.by_kernel`'s.
        iterations: That were profiled.
        layer_passes: Layers of all passes of one iteration together.
    """
    return {row["name"]: row["count"] / iterations / layer_passes for row in kernels}
