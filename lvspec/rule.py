"""A policy as numbers: one row of a tensor, whose columns have their names from here alone."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

MAX_MISMATCHES = 63
"""Draft slots of a verify pass at most, hence mismatches on a path at most."""

GATE_ROWS = 12
"""Rows of a sequence that a gate wants to have seen before it trusts what it finds in them: those
of a pass over a chain of 12 are enough."""

GATE_BINS = 64
"""Of the histogram of a sequence's rows by their relevance."""

GATE_DISTANCE = 4
"""Bins that the rows which look and those which do not are apart in the mean, at least."""


class Rule(NamedTuple):
    """A policy as plain numbers, the form in which every backend receives it: a row of a tensor.

    This is the only definition of the columns: C++ and Triton have theirs from it, see
    `rule_header` and `lvspec.kernels.rule`. Each number is a float32 value (rounded to nearest), so
    a comparison has the same outcome in Python and on a device. Limits that are off hold a number
    that no comparison can fail.
    """

    anchor_threshold: float  # where `gate_rows` is not 0, the gate puts one in its place
    anchor_regret: float  # -inf: nothing is loose at an anchor
    max_regret: float  # +inf: no limit
    top_k: float  # 0: no limit
    min_log_prob: float  # ln(min_prob); -inf: no limit
    typical_log_eps: float  # ln(typical_eps); -inf: no limit
    typical_log_delta: float  # ln(typical_delta); -inf: no limit
    min_entropy: float  # -inf: no gate
    entropy_top: float
    shift_window: float
    shift_regret: float  # +inf: no limit
    window: float
    max_run: float  # MAX_MISMATCHES: no limit
    regret_budget: float  # +inf: no limit
    regret_rate: float
    path_regret: float
    gate_rows: float  # 0: the threshold is as given
    random_share: float  # -1: rows are anchors by their relevance
    random_seed: float


def strict_rule(rule: Rule) -> Rule:
    """The rule with which nothing but exact matches is accepted; what a gate goes by stays."""
    return rule._replace(anchor_threshold=-math.inf, anchor_regret=-math.inf, shift_window=0.0)


def rule_header() -> str:
    """`csrc/rule.h`: the columns of a rule for C++."""
    names = ["k" + "".join(word.capitalize() for word in f.split("_")) for f in Rule._fields]
    lines = "".join(f"  {name},\n" for name in names)
    return (
        "// Columns of a rule. Written from lvspec.rule.Rule:\n"
        '//   python -c "from lvspec.rule import rule_header as h; print(h(), end=str())"'
        " > csrc/rule.h\n"
        "#pragma once\n\nnamespace lvspec::column {\n\n"
        f"enum : int {{\n{lines}  kCount,\n}};\n\n}}  // namespace lvspec::column\n"
    )


def as_float32(value: float) -> float:
    """`value` rounded to the nearest float32; beyond its range, infinity."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def or_off(value: float | None, off: float) -> float:
    return off if value is None else as_float32(value)


def log_or_off(value: float | None) -> float:
    return -math.inf if value is None else as_float32(math.log(value))
