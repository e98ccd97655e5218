"""Passes of a model over a few slots, recorded once and replayed without HF's Python.

On a CPU, a pass of a small model is mostly Python: some thirty module calls a layer. The pass is
the same every time but for its tensors, so it is traced once for each number of sequences and slots
and replayed: the same kernels on the same weights, hence the same bits. HF's modules are left as
they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Pass = Callable[..., tuple[Tensor, ...]]
_Key = tuple[int | bool, ...]


class _Recordings:
    """The passes of one model, as long as its weights stay where they are."""

    def __init__(self) -> None:
        self.weights: list[tuple[int, torch.dtype]] = []
        self.passes: dict[_Key, Pass | None] = {}


_RECORDINGS: WeakKeyDictionary[nn.Module, _Recordings] = WeakKeyDictionary()


class PassRecorder:
    """Records and replays the passes of one model.

    Args:
        model: The text model; its recordings live as long as it does.
    """

    def __init__(self, model: nn.Module) -> None:
        self._recordings = _RECORDINGS.setdefault(model, _Recordings())
        weights = [(weight.data_ptr(), weight.dtype) for weight in model.parameters()]
        if self._recordings.weights != weights:  # moved, converted or replaced since
            self._recordings.weights = weights
            self._recordings.passes.clear()
        # What a hook does in Python would not be recorded.
        self._has_hooks = any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )

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
        if self._has_hooks:
            return None
        passes = self._recordings.passes
        if key not in passes:
            passes[key] = _record(make_pass(), example)
        return passes[key]


def _record(module: nn.Module, example: Callable[[], tuple[Tensor, ...]]) -> Pass | None:
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constants: shapes are the key, values are not
            return torch.jit.trace(module, example(), check_trace=False)
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
