"""What runs on a device makes nothing on the host: seen without one (`support/pretend_cuda.py`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lvspec import ops

ROOT = Path(__file__).resolve().parents[2]


def pretending(folder, *words):
    """pytest in a process of its own, whose tensors say that they are on a device."""
    dropped = ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment |= {"LVSPEC_BACKEND": "cpp", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT / "tests" / "support")}
    main = Path(pytest.__file__).with_name("__main__.py")
    command = [sys.executable, main, "-q", "-p", "pretend_cuda", "--tb=short", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not ops.backends()["cpp"], reason="needs the C++ operations")
def test_what_runs_on_a_device_meets_no_other():
    """The tests of operations that `second` runs there make no tensors on the host."""
    names = ("commit", "verify_attention", "accept", "model_parts")
    files = [f"tests/ops/test_{name}.py" for name in names]
    calls = (ROOT / "bench" / "gpu_calls.sh").read_text()
    assert all(file in calls for file in files)
    others = "not registered and not well_behaved and not head_dims and not 1100"
    done = pretending(ROOT, "-m", "not slow", "-k", others, *files)
    assert done.returncode == 0, done.stdout[-3000:]


MET = """
import pytest
import torch
import torch


def test_both_there():
    x = torch.ones(3)
    y = x + torch.zeros(3, device=x.device) * torch.ones(3).cpu().to(x.device)
    assert y.is_cuda and x[torch.tensor([1], device="cpu")].is_cuda


@pytest.mark.parametrize("here", ["cpu", torch.device("cpu")])
def test_one_here(here):
    torch.ones(3) + torch.ones(3, device=here)


def test_one_moved():
    x = torch.ones(2, 3).to("cpu")
    torch.cat([x.view(3, 2), torch.ones(1, 2)])
"""


@pytest.mark.skipif(not ops.backends()["cpp"], reason="needs the C++ operations")
def test_two_devices_that_meet_are_seen(tmp_path):
    (tmp_path / "test_met.py").write_text(MET)
    done = pretending(tmp_path, "test_met.py")
    assert "3 failed, 1 passed" in done.stdout, done.stdout
    assert "tensors on [('device', (3,)), ('host', (3,))]" in done.stdout
