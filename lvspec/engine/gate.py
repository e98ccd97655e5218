"""A visual gate that does not fit its pair is said once."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

from torch import nn

from lvspec.engine.stats import DecodeStats

_WARNED: WeakKeyDictionary[nn.Module, set[float | str]] = WeakKeyDictionary()


_MISFITS = ("flags nothing", "flags everything", "not found")


def warn_of_gate(target: nn.Module, threshold: float | str, stats: DecodeStats) -> None:
    """Warn if the threshold flagged next to no row of a sequence, or next to all, or there is none.

    Once for every target and threshold, as long as the target lives.

    Args:
        target: Whose attention was measured.
        threshold: The policy's `anchor_threshold`.
        stats: Of the sequence.
    """
    if stats.gate not in _MISFITS:
        return
    warned = _WARNED.setdefault(target, set())
    if threshold in warned:
        return
    warned.add(threshold)
    if stats.gate == "not found":
        warnings.warn(
            "lvspec: no two kinds of rows were found by their attention to the video in "
            f"{stats.num_emitted} tokens, so nothing is loose, as under strict(). "
            "Generation.relevance holds what the rows have; DecodeConfig(scorer=...) can score "
            "them in another way",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    effect = (
        "nothing is checked strictly"
        if stats.gate == "flags nothing"
        else "nothing is loose but by anchor_regret"
    )
    if isinstance(threshold, str):
        given = f"{threshold!r} ({stats.threshold:g} in the end)"
    else:
        given = f"{threshold:g}"
    warnings.warn(
        f"lvspec: anchor_threshold: expected a threshold that fits this target, got {given}, "
        f"which took {stats.num_anchors} of {stats.num_emitted} rows for anchors: {effect}. "
        "Generation.relevance holds what the rows of your captions have; "
        "AcceptancePolicy.strict() needs no threshold",
        RuntimeWarning,
        stacklevel=2,
    )
