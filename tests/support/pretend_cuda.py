"""A pytest plugin: CPU tensors say that they are on CUDA, and where two devices meet it fails.

    PYTHONPATH=tests/support pytest -p pretend_cuda tests/ops

For tests that run on a device without one: whatever is made is there, by default or where
`device=` says so, and what is made on the host or moved there is not. Values are the CPU's. What
torch itself does within an operation is not looked at.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

HERE, THERE = torch.device("cpu"), torch.device("cuda", 0)
TAKES_BOTH = {"copy_", "__getitem__", "__setitem__", "to", "cpu", "cuda", "type_as"}


class PretendCuda(TorchFunctionMode):
    """What every function of torch's goes through: tensors that are on the host are known."""

    def __init__(self) -> None:
        super().__init__()
        self._hosts: dict[int, weakref.ref] = {}

    def _is_host(self, tensor):
        found = self._hosts.get(id(tensor))
        return found is not None and found() is tensor

    def _put(self, tensor, is_host):
        if is_host:
            self._hosts[id(tensor)] = weakref.ref(tensor)
        else:
            self._hosts.pop(id(tensor), None)

    def _place_of(self, value):
        """Whether an argument asks for the host; None: it does not say where."""
        if isinstance(value, torch.Tensor):
            return self._is_host(value)
        if isinstance(value, str) or type(value) is torch.device:
            return torch.device(value).type != "cuda"
        return None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.device.__get__:
            found = function(*args)
            return THERE if found == HERE and not self._is_host(args[0]) else found
        if function == torch.Tensor.is_cuda.__get__:
            return not self._is_host(args[0])
        name = getattr(function, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        hosts = [self._is_host(tensor) for tensor in tensors if tensor.dim() > 0]
        place = self._place_of(kwargs["device"]) if "device" in kwargs else None
        if name in ("to", "type_as"):
            place = next((p for p in map(self._place_of, args[1:]) if p is not None), place)
            args = (args[0], *(HERE if self._is_cuda(value) else value for value in args[1:]))
        elif name in ("cpu", "cuda"):
            place, function, args, kwargs = name == "cpu", torch.Tensor.to, (args[0], HERE), {}
        elif name not in TAKES_BOTH and len(set(hosts)) > 1:
            where = [("host" if self._is_host(x) else "device", tuple(x.shape)) for x in tensors]
            raise RuntimeError(f"{resolve_name(function) or name}: tensors on {where}")
        if self._is_cuda(kwargs.get("device")):
            kwargs["device"] = HERE
        result = function(*args, **kwargs)
        if place is None:
            place = bool(hosts) and hosts[0]
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._is_host(tensor) != place:
                if any(tensor is given for given in tensors):
                    if name not in ("to", "cpu", "cuda"):  # written in place: it stays where it is
                        continue
                    result = tensor = tensor.clone()
                self._put(tensor, place)
        return result

    @staticmethod
    def _is_cuda(value):
        is_named = isinstance(value, str) and value.startswith("cuda")
        return is_named or (type(value) is torch.device and value.type == "cuda")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    with pytest.MonkeyPatch.context() as patch, PretendCuda():
        patch.setattr(torch, "get_default_device", lambda: THERE)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        yield
