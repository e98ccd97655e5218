"""Models of a test's own, and a CPU that chooses as for a GPU."""

import copy

import pytest
import torch
from torch._guards import detect_fake_mode


@pytest.fixture
def target(random_pair):
    """A model of this test's own, of which nothing is known yet."""
    return copy.deepcopy(random_pair[0])


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Operations are chosen, and weights are merged, as for Triton; specifications compute."""
    for name in ("lvspec.ops.model_parts", "lvspec.ops"):
        monkeypatch.setattr(f"{name}.active_backend", lambda device_type: "triton")
    # What C++ there is for these tensors takes float32.
    monkeypatch.setattr(
        "lvspec.ops.model_parts._takes",
        lambda device_type, dtype: dtype == torch.float32 or detect_fake_mode() is not None,
    )
