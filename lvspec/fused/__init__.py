"""Parts of HF's text models as single operations, around the modules that stay as they are.

A pass of a few slots is some forty kernels a layer on a GPU and as many operations on a CPU, most
of them over before their call is. Norms, gated MLPs, rotary angles, and what comes between
projections and attention have one operation each: in C++ for recorded passes and prompts on a CPU
(`cpu.py`), in Triton on CUDA devices (`triton.py`). Patches are on the modules in hand, while a
pass of lvspec's runs, and gone afterwards.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lvspec.config import Fuse
from lvspec.fused.cpu import CpuOperations
from lvspec.fused.operations import Operations
from lvspec.fused.patches import Patch, fused
from lvspec.fused.recognise import Patches, recognise
from lvspec.fused.regions import compiled, compiled_regions
from lvspec.fused.triton import TritonOperations
from lvspec.ops import active_backend

__all__ = ["FusedParts", "Operations", "Patch", "fused", "recognise"]


class _Recognised:
    """The patches of one model by what makes them, as long as its weights stay where they are."""

    def __init__(self) -> None:
        self.weights: list[tuple[int, torch.dtype]] = []
        self.patches: dict[str, Patches] = {}


_RECOGNISED: WeakKeyDictionary[nn.Module, _Recognised] = WeakKeyDictionary()


class FusedParts:
    """The parts of one model that something else may stand in for; looked for when first used.

    Args:
        text: The text model; what was found lives as long as it does.
        head: What makes logits of its output.
        fuse: See `DecodeConfig.fuse`.
    """

    def __init__(self, text: nn.Module, head: nn.Module, fuse: Fuse) -> None:
        self.fuse = fuse
        self._modules = [*text.modules(), *head.modules()]
        weights = [*text.parameters(), *head.parameters()]
        self._device_type = weights[0].device.type
        self._recognised = _RECOGNISED.setdefault(text, _Recognised())
        places = [(_place(weight), weight.dtype) for weight in weights]
        if self._recognised.weights != places:  # moved, converted or replaced since
            self._recognised.weights = places
            self._recognised.patches.clear()

    def recorded(self) -> Patches:
        """What stands in for parts in recorded passes, and where a prompt is read beside them."""
        if self.fuse != "kernels" or self._backend != "cpp":
            return Patches()
        return self._patches("cpp")

    def beside(self, made: nn.Module) -> Patches:
        """The same for what a recorded pass has beside the model, such as a head of its own."""
        if not self.recorded():
            return Patches()
        known = set(self._modules)
        with torch.inference_mode(False), torch.no_grad():
            others = [module for module in made.modules() if module not in known]
            return recognise(others, CpuOperations())

    def count(self, *, is_recorded: bool) -> dict[str, int]:
        """How many parts of every kind something stands in for, in passes; see `Patches.counts`."""
        return dict((self.recorded() if is_recorded else self._unrecorded()).counts)

    def in_passes(self) -> AbstractContextManager[None]:
        """A context for passes that are not recorded; a patch a module is all that it costs."""
        return (compiled if self.fuse == "compile" else fused)(self._unrecorded())

    def in_prompts(self) -> AbstractContextManager[None]:
        """A context for reading a prompt, where passes are not recorded."""
        return nullcontext() if self.fuse == "compile" else self.in_passes()

    def _unrecorded(self) -> Patches:
        """What stands in for parts in passes that are not recorded."""
        if self.fuse == "compile":
            return self._patches("compile")
        is_triton = self.fuse == "kernels" and self._backend == "triton"
        return self._patches("triton") if is_triton else Patches()

    @property
    def _backend(self) -> str:
        return active_backend(self._device_type)

    def _patches(self, maker: str) -> Patches:
        found = self._recognised.patches
        if maker not in found:
            with torch.inference_mode(False), torch.no_grad():
                found[maker] = self._found(maker)
        return found[maker]

    def _found(self, maker: str) -> Patches:
        if maker == "compile":
            return compiled_regions(self._modules)
        is_cpp = maker == "cpp"
        operations = CpuOperations() if is_cpp else TritonOperations(self._device_type)
        return recognise(self._modules, operations)


def _place(weight: nn.Parameter) -> int:
    """Its address; quantised weights are several tensors, and have none."""
    return weight.data_ptr() if type(weight) is nn.Parameter else id(weight)
