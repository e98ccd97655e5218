"""Kernels that a decoder layer of Qwen2.5-VL is in a one-slot pass, counted without a GPU.

    python bench/launches.py [--json launches.json]

Passes of models with one layer and with three run on the CPU, in Triton's interpreter. Every
operation that PyTorch dispatches counts as a kernel, views and empty tensors do not, and one of
lvspec's as many as Triton launches for it. A library may launch more for an operation, as a matrix
product of few rows may be two kernels: what a GPU launches is in `bench/profile_step.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

# Before triton and lvspec are imported: Triton's kernels, on the CPU.
os.environ.update(TRITON_INTERPRET="1", LVSPEC_BACKEND="triton")

import torch
from measuring import script
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLForConditionalGeneration

import lvspec.kernels
from lvspec.config import Fuse
from lvspec.models.model import Model
from lvspec.shapes.model_configs import draft_config
from lvspec.tree import chain_ancestors

EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")


class _Launches(TorchDispatchMode):
    """Counts operations that make or write a tensor, and Triton's launches, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        is_ours = function.namespace == "lvspec"  # its kernels count themselves
        if not (is_ours or name in EMPTY or name == "_unsafe_view" or _is_view(function)):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def _is_view(function: Any) -> bool:
    aliases = [returned.alias_info for returned in function._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


class _Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any, name: str, counts: Counter[str]) -> None:
        self._kernel, self._name, self._counts = kernel, name, counts

    def __getitem__(self, grid: Any) -> Any:
        self._counts[self._name] += 1
        return self._kernel[grid]


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """What is launched within this context."""
    replaced = []
    mode = _Launches()
    for found in pkgutil.iter_modules(lvspec.kernels.__path__):
        module = importlib.import_module(f"lvspec.kernels.{found.name}")
        for name, value in vars(module).items():
            if name.endswith("_kernel"):
                replaced.append((module, name, value))
    try:
        for module, name, value in replaced:
            setattr(module, name, _Counted(value, name, mode.counts))
        with mode:
            yield mode.counts
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


@torch.no_grad()  # in inference mode a conversion is dispatched as a view of itself
def launches_of_a_pass(layers: int, fuse: Fuse, dtype: torch.dtype) -> Counter[str]:
    """Of one slot behind 40 rows, scores not asked for."""
    config = draft_config()
    config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = ["full_attention"] * layers
    torch.manual_seed(0)
    hf = Qwen2_5_VLForConditionalGeneration(config).eval().to(dtype)
    model = Model(hf, "target", fuse=fuse)
    cache = model.new_cache(batch_size=1, capacity=64, num_slots=1)
    positions = torch.arange(40).expand(3, -1)
    cache.finish_prefill(0, positions, torch.arange(40) < 30)
    tokens, depths = torch.ones(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    ancestors = chain_ancestors(1, batch_size=1, device=model.device)
    with model.active():
        assert fuse == "none" or model.made.plan is not None, model.made.obstacle
    with model.active(), counting() as counts:
        model.step(tokens, depths, ancestors, cache)
    return counts


def launches_of_a_layer(fuse: Fuse, dtype: torch.dtype = torch.bfloat16) -> tuple[Counter, int]:
    """Of one decoder layer by name, and of everything in the pass that is not one."""
    one, three = (launches_of_a_pass(layers, fuse, dtype) for layers in (1, 3))
    layer = Counter({name: (three[name] - one[name]) // 2 for name in three})
    layer = +layer
    return layer, one.total() - layer.total()


def main() -> int:
    options = script.begin(script.parser_of(__doc__))
    results = {}
    for fuse in ("none", "kernels"):
        layer, rest = launches_of_a_layer(fuse)
        results[fuse] = {"a layer": layer.total(), "besides": rest, "by name": dict(layer)}
        print(f"fuse={fuse!r}: {layer.total()} kernels a layer, {rest} besides them in a pass")
        print("    " + ", ".join(f"{name} {count}" for name, count in layer.most_common()))
    script.finish(options, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
