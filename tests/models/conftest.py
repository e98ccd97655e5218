"""Models of a test's own, and a CPU that chooses as for a GPU."""

import copy
import multiprocessing
import socket

import pytest
import ranks as support
import torch
from torch._guards import detect_fake_mode

IMPORTS = [  # all ranks are forks of one process that has imported these
    *("lvspec.engine.decoder", "lvspec.models.loading"),
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
]


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


@pytest.fixture(scope="module")
def together():
    """`together(job, folders, folder)`: two processes, which are gone when the tests are over."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    started = []

    def run(job, folders, folder, size=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = [(job, folders, folder, number, size, port) for number in range(size)]
        ranks = [context.Process(target=support.main, args=each) for each in given]
        for process in ranks:
            process.start()
        started.extend(ranks)
        return ranks

    yield run
    for process in started:
        process.kill()
        process.join()
