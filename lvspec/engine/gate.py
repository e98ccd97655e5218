"""A visual gate that does not fit its pair is said once."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

from torch import nn

from lvspec.engine.stats import DecodeStats

_WARNED: WeakKeyDictionary[nn.Module, set[float]] = WeakKeyDictionary()


def warn_of_gate(target: nn.Module, threshold: float, stats: DecodeStats) -> None:
    """Warn if the threshold flagged next to no row of a sequence, or next to all.

    Once for every target and threshold, as long as the target lives.

    Args:
        target: Whose attention was measured.
        threshold: The policy's `anchor_threshold`.
        stats: Of the sequence.
    """
    if stats.gate not in ("flags nothing", "flags everything"):
        return
    warned = _WARNED.setdefault(target, set())
    if threshold in warned:
        return
    warned.add(threshold)
    effect = (
        "nothing is checked strictly"
        if stats.gate == "flags nothing"
        else "nothing may be loose, as under strict()"
    )
    warnings.warn(
        f"lvspec: anchor_threshold: expected a threshold that fits this target, got {threshold:g}, "
        f"which took {stats.num_anchors} of {stats.num_emitted} rows for anchors: {effect}. "
        "Generation.relevance holds what the rows of your captions have; "
        "AcceptancePolicy.strict() needs no threshold",
        RuntimeWarning,
        stacklevel=2,
    )
