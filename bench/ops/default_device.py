"""A pytest plugin that runs the tests of the operations on another device than the CPU.

    LVSPEC_BACKEND=triton LVSPEC_TEST_DEVICE=cuda PYTHONPATH=bench \
        pytest -p ops.default_device tests/ops

The tests make their tensors on torch's default device, which this sets. LVSPEC_BACKEND=triton
because they ask which types the backend of the CPU takes; without a device it cannot be asked for.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _default_device():
    with torch.device(os.environ.get("LVSPEC_TEST_DEVICE", "cpu")):
        yield
