"""Which code runs a model's passes: lvspec's over a plan of it, or HF's, and why.

A plan is made once for every state in which the model is found (`watch.py`), and checked: on random
numbers each layer must give what HF's own gives, or HF's forward runs instead, which is said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lvspec import ops
from lvspec.config import Fuse
from lvspec.models.attention import AttentionStep
from lvspec.models.cache import SlotCache
from lvspec.models.check_plan import first_difference
from lvspec.models.cpu_pass import CpuPass, cpu_pass_of
from lvspec.models.merged import merge, separate
from lvspec.models.plan import DecoderPlan, NoPlan, plan_of
from lvspec.models.watch import Watch
from lvspec.warmup import warming_up


@dataclass(frozen=True)
class Made:
    """For one state of a model: its plan, or why there is none.

    Attributes:
        plan: None where passes are HF's.
        obstacle: Why they are; None where there is a plan.
        cpu: The whole pass as one C++ operation, where there is one.
    """

    plan: DecoderPlan | None = None
    obstacle: str | None = None
    cpu: CpuPass | None = None

    @property
    def parts(self) -> dict[str, int]:
        """See `DecodeStats.parts`."""
        plan = self.plan
        return {
            "layers": 0 if plan is None else len(plan.layers),
            "called": 0 if plan is None else len(plan.called),
            "compact": 0 if self.cpu is None else self.cpu.num_compact,
        }

    @property
    def passes(self) -> str:
        """See `DecodeStats.passes`."""
        if self.plan is None:
            return f"HF's: {self.obstacle}"
        return "own: one operation" if self.cpu is not None else "own"


@dataclass
class _Known:
    """What was made for the states that a model may come back to, by their numbers."""

    made: dict[int, Made] = field(default_factory=dict)


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


class OwnPasses:
    """The passes of one text model that are lvspec's.

    Args:
        text: The text model; what is made for it lives as long as it does.
        model: Whose it is, with a head.
        fuse: See `DecodeConfig.fuse`.
        watch: Of the text model; it is held whenever this is asked.
        role: "target" or "draft", for messages.
        obstacle: Why a model of this family has no plan; None: it may have one.
    """

    def __init__(
        self,
        text: nn.Module,
        model: nn.Module,
        fuse: Fuse,
        watch: Watch,
        role: str,
        obstacle: str | None,
    ) -> None:
        self._text, self._model, self._watch, self._role = text, model, watch, role
        self._obstacle = 'fuse="none"' if fuse == "none" else obstacle
        self._known = _KNOWN.setdefault(text, _Known())

    @property
    def made(self) -> Made:
        """For the model as it was last looked at."""
        obstacle = self._obstacle or self._watch.obstacle
        if obstacle is not None:
            return Made(obstacle=obstacle)
        made, revision = self._known.made, self._watch.revision
        if revision not in made:
            for other in made.keys() - self._watch.kept:
                del made[other]
            found = self._make()
            made[self._watch.revision] = found  # where weights were moved it is another state
        return made[self._watch.revision]

    def look(self) -> None:
        """See to it that nothing is used that was copied from weights of before."""
        made = self._known.made.get(self._watch.revision)
        if made is not None and made.cpu is not None and not made.cpu.is_current():
            del self._known.made[self._watch.revision]

    def forget(self) -> None:
        """Give up all that was made; weights that were put together have their own memory again."""
        for made in self._known.made.values():
            if made.plan is not None:
                separate(made.plan)
        self._known.made.clear()

    @warming_up()
    def _make(self) -> Made:
        with torch.inference_mode(False), torch.no_grad():
            try:
                plan = plan_of(self._text)
            except NoPlan as reason:
                return self._hf(str(reason))
            if ops.active_backend(self._text.device.type) == "triton" and merge(plan):
                self._watch.look_again()
                plan = plan_of(self._text)
            try:
                different = first_difference(plan)
            except Exception as error:  # a kernel that does not compile, say
                return self._hf(f"{type(error).__name__}: {error}")
            if different is not None:
                return self._hf(f"{different} computes something else than a plain decoder's")
            return Made(plan, cpu=self._cpu(plan))

    def _cpu(self, plan: DecoderPlan) -> CpuPass | None:
        cpu = cpu_pass_of(plan, self._model.lm_head)
        if cpu is None:
            return None

        def run_layer(
            index: int, hidden: Tensor, cache: SlotCache, step: AttentionStep
        ) -> Tensor:
            depths = torch.arange(hidden.shape[1])
            result, masses, peaks = cpu.run_layer(index, hidden, depths, step.ancestors, cache)
            step.masses.append(masses[0])
            step.peaks.append(peaks[0])
            return result

        different = first_difference(plan, run_layer)
        if different is not None:
            self._watch.say(
                f"passes of the {self._role} are many operations, slower: {different} is another "
                "in csrc/text_pass.h"
            )
        return cpu if different is None else None

    def _hf(self, reason: str) -> Made:
        self._watch.say(f"passes of the {self._role} are HF's own, slower: {reason}")
        return Made(obstacle=reason)
