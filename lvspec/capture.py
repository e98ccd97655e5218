"""Passes of a model over a few slots, recorded once and replayed without HF's Python.

On a CPU, a pass of a small model is mostly Python: some thirty module calls a layer. The pass is
the same every time but for its tensors, so it is traced once for each number of sequences and slots
and replayed: the same kernels on the same weights. HF's modules are left as they are. Where the C++
operations are there, float32 models call those meanwhile, for products of a few rows and for
sequences of small operations that one can do (`lvspec.fused`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lvspec.config import Fuse
from lvspec.fused import FusedParts, Patch, fused
from lvspec.warmup import warming_up

_FIRST_CALLS = 2
"""Calls in which torch optimises what was recorded; they are made when it is recorded."""

Pass = Callable[..., tuple[Tensor, ...]]
_Key = tuple[Hashable, ...]


class _Recordings:
    """The passes of one model, as long as its weights stay where they are."""

    def __init__(self) -> None:
        self.weights: list[tuple[int, torch.dtype]] = []
        self.passes: dict[_Key, Pass | None] = {}


_RECORDINGS: WeakKeyDictionary[nn.Module, dict[Fuse, _Recordings]] = WeakKeyDictionary()


class PassRecorder:
    """Records and replays the passes of one model.

    Args:
        text: The text model; its recordings live as long as it does.
        head: What makes logits of its output.
        parts: What stands in for parts of the two.
    """

    def __init__(self, text: nn.Module, head: nn.Module, parts: FusedParts) -> None:
        by_fuse = _RECORDINGS.setdefault(text, {})
        self._recordings = by_fuse.setdefault(parts.fuse, _Recordings())
        self._parts = parts
        modules = [*text.modules(), *head.modules()]
        weights = [*text.parameters(), *head.parameters()]
        buffers = [*text.buffers(), *head.buffers()]
        # What a hook does in Python would not be recorded, and quantised weights are more than one
        # tensor each: parameters of a class of their own, or integers in buffers.
        self._is_plain = (
            all(type(weight) is nn.Parameter for weight in weights)
            and all(buffer.is_floating_point() for buffer in buffers)
            and not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        )
        if self._is_plain:
            places = [(weight.data_ptr(), weight.dtype) for weight in weights]
            if self._recordings.weights != places:  # moved, converted or replaced since
                self._recordings.weights = places
                self._recordings.passes.clear()

    def fused(self) -> AbstractContextManager[None]:
        """Within this context the model's parts call operations of `csrc/`, recorded or not."""
        return fused(self._patches())

    def _patches(self) -> list[Patch]:
        return self._parts.recorded() if self._is_plain else []

    def get(
        self,
        key: _Key,
        make_pass: Callable[[], nn.Module],
        example: Callable[[], tuple[Tensor, ...]],
    ) -> Pass | None:
        """The recorded pass, or None if it cannot be recorded.

        Args:
            key: What the code of the pass depends on, besides the model: shapes and flags.
            make_pass: Makes the pass as a module of tensors; it may write into its arguments.
            example: Makes arguments to record with; any of the right shapes.
        """
        if not self._is_plain:
            return None
        passes = self._recordings.passes
        if key not in passes:
            made = make_pass()
            passes[key] = _record(made, example, [*self._patches(), *self._parts.beside(made)])
        return passes[key]


@warming_up()
def _record(
    module: nn.Module, example: Callable[[], tuple[Tensor, ...]], patches: list[Patch]
) -> Pass | None:
    """A module of tensors as a recorded pass, or None, with a warning, if it cannot be recorded."""
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constants: shapes are the key, values are not
            with fused(patches):
                traced = torch.jit.trace(module, example(), check_trace=False)
                for _ in range(_FIRST_CALLS):
                    traced(*example())
                return traced
    except Exception as error:
        warnings.warn(
            f"lvspec: passes are run by HF's Python instead of recorded, slower: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def is_recordable(device: Any, workspace: Tensor | None) -> bool:
    """Whether passes on this device are recorded: on a CPU, with operations made for it."""
    return torch.device(device).type == "cpu" and workspace is None
