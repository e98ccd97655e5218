"""Passes of a model over a few slots, recorded once and replayed without HF's Python.

On a CPU, a pass of a small model is mostly Python: some thirty module calls a layer. The pass is
the same every time but for its tensors, so it is traced once for each number of sequences and slots
and replayed, as long as the model is found unchanged (`watch.py`): the same kernels on the same
weights. HF's modules are left as they are. Where the C++ operations are there, float32 models call
those meanwhile, for products of a few rows and for sequences of small operations that one can do
(`fused/`).
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
from lvspec.models.fused import FusedParts, Patch, fused
from lvspec.models.hf_names import looked_at_quietly
from lvspec.models.watch import Watch
from lvspec.warmup import warming_up

_FIRST_CALLS = 2
"""Calls in which torch optimises what was recorded; they are made when it is recorded."""

Pass = Callable[..., tuple[Tensor, ...]]
_Key = tuple[Hashable, ...]


class _Recordings:
    """The passes of one model in the states that it may come back to."""

    def __init__(self) -> None:
        self.revision = 0
        self.obstacle: str | None = None
        self.passes: dict[_Key, Pass | None] = {}


_RECORDINGS: WeakKeyDictionary[nn.Module, dict[Fuse, _Recordings]] = WeakKeyDictionary()


class PassRecorder:
    """Records and replays the passes of one model.

    Args:
        text: The text model; its recordings live as long as it does.
        parts: What stands in for parts of it and its head.
        watch: Of the text model.
    """

    def __init__(self, text: nn.Module, parts: FusedParts, watch: Watch) -> None:
        by_fuse = _RECORDINGS.setdefault(text, {})
        self._recordings = by_fuse.setdefault(parts.fuse, _Recordings())
        self._parts, self._watch = parts, watch

    @property
    def obstacle(self) -> str | None:
        """Why passes of the model as it was last looked at are not recorded."""
        recordings = self._recordings
        if recordings.revision != self._watch.revision:
            recordings.revision, kept = self._watch.revision, self._watch.kept
            for key in [key for key in recordings.passes if key[0] not in kept]:
                del recordings.passes[key]
            recordings.obstacle = self._watch.obstacle
            if recordings.obstacle is None and not _has_plain_tensors(self._parts.modules):
                recordings.obstacle = "quantised weights"
        return recordings.obstacle

    def fused(self) -> AbstractContextManager[None]:
        """Within this context the model's parts call operations of `csrc/`, recorded or not."""
        return fused(self._patches())

    def _patches(self) -> list[Patch]:
        return self._parts.recorded() if self.obstacle is None else []

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
        if self.obstacle is not None:
            return None
        passes, key = self._recordings.passes, (self._watch.revision, *key)
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
            with fused(patches), looked_at_quietly():
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


def _has_plain_tensors(modules: list[nn.Module]) -> bool:
    """Whether each weight is one tensor: quantised ones are more than one, or integers."""
    weights = [x for module in modules for x in module.parameters(recurse=False)]
    buffers = [x for module in modules for x in module.buffers(recurse=False)]
    return all(type(weight) is nn.Parameter for weight in weights) and all(
        buffer.is_floating_point() for buffer in buffers
    )


def is_recordable(device: Any, workspace: Tensor | None) -> bool:
    """Whether passes on this device are recorded: on a CPU, with operations made for it."""
    return torch.device(device).type == "cpu" and workspace is None
