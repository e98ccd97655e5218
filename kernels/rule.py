"""What `lvspec.rule` defines, as constants of the kernels: a rule's columns, a gate's numbers.

The one thing of lvspec that a kernel imports. Kernels import these names, not this module: a
compiled kernel is known by the values of the names that it uses.
"""

from __future__ import annotations

import triton.language as tl

from lvspec.rule import GATE_BINS, GATE_DISTANCE, Rule


def _column(name: str) -> tl.constexpr:
    return tl.constexpr(Rule._fields.index(name))


BINS = tl.constexpr(GATE_BINS)
DISTANCE = tl.constexpr(GATE_DISTANCE)
COUNT = tl.constexpr(len(Rule._fields))
ANCHOR_THRESHOLD = _column("anchor_threshold")
ANCHOR_REGRET = _column("anchor_regret")
MAX_REGRET = _column("max_regret")
TOP_K = _column("top_k")
MIN_LOG_PROB = _column("min_log_prob")
TYPICAL_LOG_EPS = _column("typical_log_eps")
TYPICAL_LOG_DELTA = _column("typical_log_delta")
MIN_ENTROPY = _column("min_entropy")
ENTROPY_TOP = _column("entropy_top")
SHIFT_WINDOW = _column("shift_window")
SHIFT_REGRET = _column("shift_regret")
WINDOW = _column("window")
MAX_RUN = _column("max_run")
REGRET_BUDGET = _column("regret_budget")
REGRET_RATE = _column("regret_rate")
PATH_REGRET = _column("path_regret")
GATE_ROWS = _column("gate_rows")
