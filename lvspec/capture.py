"""Passes of a model over a few slots, recorded once and replayed without HF's Python.

On a CPU, a pass of a small model is mostly Python: some thirty module calls a layer. The pass is
the same every time but for its tensors, so it is traced once for each number of sequences and slots
and replayed: the same kernels on the same weights. HF's modules are left as they are. Where the C++
operations are there, some kernels are exchanged while recording, in float32: matrix products of a
few rows, for which the library's own are made for many (`csrc/linear.h`), and sequences of small
operations that one can do (`lvspec.fused`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lvspec.fused import MAX_SMALL_ROWS, fused
from lvspec.ops import active_backend

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
        text: The text model; its recordings live as long as it does.
        head: What makes logits of its output.
    """

    def __init__(self, text: nn.Module, head: nn.Module) -> None:
        self._recordings = _RECORDINGS.setdefault(text, _Recordings())
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
            passes[key] = _record(make_pass(), example)
        return passes[key]


def _record(module: nn.Module, example: Callable[[], tuple[Tensor, ...]]) -> Pass | None:
    """A module of tensors as a recorded pass, or None, with a warning, if it cannot be recorded."""
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constants: shapes are the key, values are not
            modules = module.modules() if active_backend("cpu") == "cpp" else ()
            with fused(modules), _SmallProducts():
                return torch.jit.trace(module, example(), check_trace=False)
    except Exception as error:
        warnings.warn(
            f"lvspec: passes are run by HF's Python instead of recorded, slower: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


class _SmallProducts(TorchFunctionMode):
    """Linear layers of a few rows are computed by csrc/linear.h."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is nn.functional.linear and _is_small(*args, **(kwargs or {})):
            return torch.ops.lvspec.cpu_linear(*args, *([None] * (3 - len(args))), **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _is_small(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Two rows to a vector of them: one row is a matter of reading the weights for any library."""
    return (
        active_backend("cpu") == "cpp"
        and input.dim() == 3
        and 2 <= input.shape[0] * input.shape[1] <= MAX_SMALL_ROWS
        and all(type(x) in (Tensor, nn.Parameter) for x in (input, weight))
        and all(x.dtype == torch.float32 for x in (input, weight))
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()))
    )


def is_recordable(device: Any, workspace: Tensor | None) -> bool:
    """Whether passes on this device are recorded: on a CPU, with operations made for it."""
    return torch.device(device).type == "cpu" and workspace is None
