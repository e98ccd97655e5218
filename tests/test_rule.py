"""A policy's numbers have one definition, of which C++ has its own."""

import re
from pathlib import Path

from lvspec.rule import GATE_BINS, GATE_DISTANCE, rule_header

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def test_columns_of_cpp():
    """Written anew where this fails, by the command in the file's head."""
    assert (CSRC / "rule.h").read_text() == rule_header()


def test_numbers_of_the_gate_in_cpp():
    text = (CSRC / "kernels.h").read_text()
    (found,) = re.findall(r"kGateBins = (\d+), kGateDistance = (\d+);", text)
    assert tuple(map(int, found)) == (GATE_BINS, GATE_DISTANCE)
