"""Settings that are tried: policies, and how long chains are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lvspec.policy import AUTO, AcceptancePolicy
from lvspec.reference.gate import OCTAVE_BINS

GAMMAS = (4, 6, 8, 12, 16, 24)
"""Drafted tokens of a pass that are tried; rows are recorded by the longest."""
SHARES = (0.5, 0.7, 0.8, 0.9, 0.95)
"""Of the recorded rows, those that a gate lets be loose."""
REGRETS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Largest regret in nats of what is loose."""
ANCHOR_REGRET, SHIFT_WINDOW, TOP_K = 0.1, 2, 5
NAME = "calibrated"

STRICT = AcceptancePolicy.strict()
OWN = AcceptancePolicy(anchor_threshold=AUTO, max_regret=0.0, top_k=1, name="own")
"""Gives the target's own tokens, as `STRICT`, and says which rows look at the video: the only one
of a row's best one is the best itself."""
WIDEST = AcceptancePolicy(
    anchor_threshold=math.inf,
    max_regret=REGRETS[-1],
    top_k=TOP_K,
    shift_window=SHIFT_WINDOW,
    shift_regret=REGRETS[-1],
    name="widest",
)
"""Accepts whatever any of the policies here does."""
USUAL = AcceptancePolicy.lvspec(name="usual")
"""Between these: rows behind what is usually accepted are recorded too."""


@dataclass(frozen=True)
class Candidate:
    """A policy and the length of its chains."""

    policy: AcceptancePolicy
    gamma: int

    @property
    def key(self) -> str:
        """What tells it from others, in a few letters."""
        values = {k: v for k, v in self.policy.to_dict().items() if k != "name"}
        text = json.dumps([values, self.gamma], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe(self) -> str:
        """In a few words."""
        policy = self.policy
        if policy.is_exact or policy.top_k == 1:
            return "strict"
        threshold = policy.anchor_threshold
        number = "auto" if threshold == AUTO else f"{threshold:.2g}"
        gate = "no gate" if threshold == math.inf else f"gate {number}"
        parts = [gate, f"regret {policy.max_regret:g}"]
        if policy.anchor_regret is not None and threshold != math.inf:
            parts.append(f"anchors {policy.anchor_regret:g}")
        if policy.shift_window:
            parts.append(f"shift {policy.shift_window}")
        return ", ".join(parts)

    def settings(self) -> dict[str, Any]:
        """As plain values."""
        return {"policy": self.policy.to_dict(), "gamma": self.gamma}


def gates(relevance: Sequence[float]) -> list[float | str]:
    """The thresholds that are tried, the safest first, given the rows that were recorded.

    Four to an octave, as the gate has them: nearer ones would be fitted to these clips.
    """
    rows = np.asarray([value for value in relevance if not math.isnan(value)])
    found = [_rounded(float(np.quantile(rows, share))) for share in SHARES] if rows.size else []
    return [*dict.fromkeys(value for value in found if value > 0), AUTO, math.inf]


def _rounded(value: float) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2 * OCTAVE_BINS) / (2 * OCTAVE_BINS), exponent)


def policies(relevance: Sequence[float], base: AcceptancePolicy) -> Iterator[AcceptancePolicy]:
    """Those of the first round, without shifts.

    Args:
        relevance: Of rows of the target's own captions.
        base: Whose guarded ids all of them have.
    """
    for gate in gates(relevance):
        for regret in REGRETS:
            for at_anchors in (None, ANCHOR_REGRET) if gate != math.inf else (None,):
                yield replace(
                    base,
                    anchor_threshold=gate,
                    max_regret=regret,
                    anchor_regret=at_anchors,
                    top_k=TOP_K,
                    name=NAME,
                )


def with_shifts(policy: AcceptancePolicy) -> AcceptancePolicy:
    """The same, and a right word that stands a position or two off is kept."""
    return replace(policy, shift_window=SHIFT_WINDOW, shift_regret=policy.max_regret)
