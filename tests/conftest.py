"""What every test gets: one thread, a seed, and memory that is not zero by luck."""

import random

import pytest
import torch

POISON = 0x55  # large as an index, odd as a length, neither 0 nor -1


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Uninitialised tensors hold NaN or POISON: what is read before it is written shows."""

    def poisoned(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if type(tensor) is torch.Tensor and not tensor.is_meta and not tensor.is_quantized:
                with torch.no_grad():
                    tensor.fill_(torch.nan if tensor.dtype.is_floating_point else POISON)
            return tensor

        return allocated

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
