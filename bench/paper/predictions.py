"""What is expected of an iteration before anything is measured: its bytes and its kernels.

The document of `limits.py --predict`. Kernels are counted on tensors without data (`launches.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from launches import launches_of
from limits import Gpu, Setting, limit
from pairs.pairs import PAIRS

PREDICTED = ["qwen-32b-3b", "qwen-32b-7b", "qwen-7b-3b", "llava-7b-0.5b", "llava-72b-7b"]
"""Pairs of `--predict`: the one with most to gain first."""
KERNEL_SECONDS = 3.4e-6
"""What a kernel of a graph costs besides its bytes: it fills, it drains, and a gap follows. By
hand, of a one-slot layer of the 3B draft when it had 14 kernels: 87 us for bytes of 40 us."""
EARLY_SECONDS = 1.2e-6
"""The same of one that is launched before the one ahead has ended: of those 3.4 us the gap (1 us)
is no more, and of filling and draining, taken to be equal, the filling is beside that one."""


@dataclass(frozen=True)
class Prediction:
    """What is expected of an iteration; milliseconds.

    Attributes:
        limit_ms, alone_limit_ms: Bytes over bandwidth, of an iteration and of a token alone.
        kernels, alone_kernels: As `launches.py` counts them.
        early: Those of an iteration that could be launched early.
        estimate_ms, alone_ms: Both together, as kernels are launched now.
        early_ms: An iteration with early launches.
        tau_for_2x, tau_for_3x: What must be accepted for these speed-ups by the estimate; more
            than gamma + 1 cannot be.
    """

    limit_ms: float
    kernels: int
    early: int
    estimate_ms: float
    early_ms: float
    alone_limit_ms: float
    alone_kernels: int
    alone_ms: float
    tau_for_2x: float
    tau_for_3x: float
    fits: bool


def predict(setting: Setting, kernels: int, early: int, alone_kernels: int) -> Prediction:
    """What both the bytes and the number of kernels say.

    Args:
        kernels: Of an iteration.
        early: Those of them that could be launched early.
        alone_kernels: Of a token of the target alone.
    """
    best = limit(replace(setting, gap=0.0))
    estimate = best.iteration_ms + 1e3 * KERNEL_SECONDS * kernels
    alone = best.autoregression_ms + 1e3 * KERNEL_SECONDS * alone_kernels
    return Prediction(
        limit_ms=best.iteration_ms,
        kernels=kernels,
        early=early,
        estimate_ms=estimate,
        early_ms=estimate - 1e3 * (KERNEL_SECONDS - EARLY_SECONDS) * early,
        alone_limit_ms=best.autoregression_ms,
        alone_kernels=alone_kernels,
        alone_ms=alone,
        tau_for_2x=2 * estimate / alone,
        tau_for_3x=3 * estimate / alone,
        fits=best.fits,
    )


def predictions(names: list[str], contexts: list[int], gamma: int, gpu: Gpu) -> dict[str, Any]:
    """The document of `--predict`, its rows by pair and context."""
    rows = []
    for name in names:
        pair = PAIRS[name]
        counted = launches_of(pair, gamma)
        for context in contexts:
            setting = Setting(pair.target, pair.draft, gpu, context=context, gamma=gamma)
            found = predict(setting, counted.iteration, counted.early, counted.alone)
            which = {"pair": name, "label": pair.label, "context": context}
            rows.append({**which, **asdict(found), "parts": counted.parts})
    return {
        "kind": "predictions",
        "gpu": gpu.name,
        "gb_per_s": gpu.bandwidth / 1e9,
        "gamma": gamma,
        "kernel_us": 1e6 * KERNEL_SECONDS,
        "early_us": 1e6 * EARLY_SECONDS,
        "rows": rows,
    }
