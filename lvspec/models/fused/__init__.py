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
from transformers import PreTrainedModel

from lvspec.config import Fuse
from lvspec.models.fingerprint import modules_of
from lvspec.models.fused.cpu import CpuOperations
from lvspec.models.fused.operations import Operations
from lvspec.models.fused.patches import Patch, fused, is_patched
from lvspec.models.fused.recognise import Patches, recognise
from lvspec.models.fused.regions import compiled, compiled_regions
from lvspec.models.fused.triton import TritonOperations
from lvspec.models.watch import Watch
from lvspec.ops import active_backend
from lvspec.warmup import warming_up

__all__ = ["FusedParts", "Operations", "Patch", "fused", "is_patched", "recognise"]


class _Recognised:
    """The patches of one model by its state and what makes them."""

    def __init__(self) -> None:
        self.patches: dict[tuple[int, str], Patches] = {}


_RECOGNISED: WeakKeyDictionary[nn.Module, _Recognised] = WeakKeyDictionary()


class FusedParts:
    """The parts of one model that something else may stand in for; looked for when first used.

    Args:
        model: The HF model.
        text: Its text model; what was found lives as long as that does.
        fuse: See `DecodeConfig.fuse`.
        watch: Of the text model; while it has an obstacle, nothing stands in for parts.
    """

    def __init__(
        self, model: PreTrainedModel, text: PreTrainedModel, fuse: Fuse, watch: Watch
    ) -> None:
        self.fuse = fuse
        self._model, self._text, self._watch = model, text, watch
        self._recognised = _RECOGNISED.setdefault(text, _Recognised())

    @property
    def modules(self) -> list[nn.Module]:
        """Those of the text model and of the head, as they are now."""
        return modules_of(self._text, self._model.lm_head)

    def recorded(self) -> Patches:
        """What stands in for parts in recorded passes, and where a prompt is read beside them."""
        if self.fuse != "kernels" or self._backend != "cpp":
            return Patches()
        return self._patches("cpp")

    def beside(self, made: nn.Module) -> Patches:
        """The same for what a recorded pass has beside the model, such as a head of its own."""
        if not self.recorded():
            return Patches()
        known = set(self.modules)
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
        return active_backend(self._model.device.type)

    def _patches(self, maker: str) -> Patches:
        if self._watch.obstacle is not None:
            return Patches()
        found, key = self._recognised.patches, (self._watch.revision, maker)
        if key not in found:
            for other in [other for other in found if other[0] not in self._watch.kept]:
                del found[other]
            with torch.inference_mode(False), torch.no_grad():
                found[key] = self._found(maker)
        return found[key]

    @warming_up()
    def _found(self, maker: str) -> Patches:
        if maker == "compile":
            return compiled_regions(self.modules)
        is_cpp = maker == "cpp"
        operations = CpuOperations() if is_cpp else TritonOperations(self._model.device.type)
        return recognise(self.modules, operations)
