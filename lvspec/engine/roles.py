"""The models of an engine: whose they are while it decodes, and what is known of their passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from lvspec.engine.stats import DecodeStats
from lvspec.models.holding import held
from lvspec.models.model import Model
from lvspec.models.tower import SharedTower
from lvspec.phases.draft import CachedDrafter, Drafter


class Roles:
    """The target, and the model of its drafter where there is one.

    Attributes:
        models: Each once: a target that drafts for itself is one.
        revisions: Of each, as `have_changed` found them last.
    """

    def __init__(self, target: Model, drafter: Drafter) -> None:
        self._target = target
        self._drafter = drafter if isinstance(drafter, CachedDrafter) else None
        self.models = [target]
        if self._drafter is not None and self._drafter.model is not target:
            self.models.append(self._drafter.model)
        self.revisions: tuple[int, ...] = ()
        self._tower = SharedTower(*self.models) if len(self.models) > 1 else None

    @contextmanager
    def reading(self, inputs: Mapping[str, Any], stats: DecodeStats) -> Iterator[None]:
        """`held`, for the prompt of one sequence, whose time is that of `prefill`.

        Where target and draft have the same vision tower, it looks at the prompt once.
        """
        with self.held(), stats.timer.phase("prefill"):
            if self._tower is None or not inputs.keys() & set(self._target.family.visual_inputs):
                yield
                return
            with self._tower.looking() as sight:
                yield
            stats.draft_vision = sight.description

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context in which the models are this thread's, and the device is the target's."""
        with self._on_device(), held(self.models):
            yield

    def _on_device(self) -> AbstractContextManager:
        """Events and graphs are of the current device."""
        device = self._target.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def have_changed(self) -> bool:
        """Whether what Python decides from is another than when this was asked last."""
        before, self.revisions = self.revisions, tuple(m.watch.revision for m in self.models)
        return self.revisions != before

    def passes(self) -> dict[str, str]:
        """As `DecodeStats.passes`."""
        return {model.role: _passes(model) for model in self.models}

    def parts(self) -> dict[str, dict[str, int]]:
        """As `DecodeStats.parts`."""
        found = {"target": self._target.made.parts}
        if self._drafter is not None:
            found["draft"] = self._drafter.model.made.parts
        return found


def _passes(model: Model) -> str:
    ranks = model.ranks
    part = "" if ranks.size == 1 else f", part {ranks.number + 1} of {ranks.size}"
    return f"{model.made.passes}{part}"
