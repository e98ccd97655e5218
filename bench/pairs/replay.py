"""Acceptance as it was measured, on models with random weights, which would accept nothing.

The accept kernel runs, and then its result is replaced on the device by an entry of a table: six
small operations more than a real iteration, and nothing that the host has to look at. Figures made
this way are labelled `replayed tau = ...` wherever they stand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pairs.random_models import RandomPromptModel, random_prompt
from torch import Tensor
from transformers import PreTrainedModel

from lvspec.config import DecodeConfig
from lvspec.engine.engine import Engine
from lvspec.engine.sequence import Request
from lvspec.models.cache import SlotCache
from lvspec.ops import Acceptance
from lvspec.phases.accept import Judgement
from lvspec.phases.draft import make_drafter
from lvspec.phases.slots import Draft
from lvspec.phases.verify import Verification
from lvspec.policy import AcceptancePolicy

TRACES = Path(__file__).parents[1] / "traces"


@dataclass(frozen=True)
class AcceptanceTrace:
    """How many draft tokens the iterations of a run accepted.

    Attributes:
        name: What the run was.
        num_accepted: One entry an iteration, without the bonus token.
    """

    name: str
    num_accepted: tuple[int, ...]

    @property
    def tau(self) -> float:
        return sum(self.num_accepted) / len(self.num_accepted) + 1

    @classmethod
    def stored(cls, name: str, path: Path | None = None) -> AcceptanceTrace:
        """A trace of `bench/traces`, by the name of its policy.

        Raises:
            ValueError: There is none of that name.
        """
        path = TRACES / "embedded-gamma12.json" if path is None else path
        found = json.loads(path.read_text())["traces"]
        if name not in found:
            raise ValueError(f"trace: expected one of {', '.join(found)}, got {name!r}")
        return cls(f"embedded pair, {name}", tuple(found[name]["num_accepted"]))

    @classmethod
    def synthetic(cls, tau: float, length: int = 256) -> AcceptanceTrace:
        """The two whole numbers around `tau - 1`, taking turns evenly.

        Raises:
            ValueError: `tau` is less than 1, which the bonus token alone gives.
        """
        if not 1 <= tau < math.inf:
            raise ValueError(f"tau: expected a number >= 1, got {tau}")
        ends = [math.floor(index * (tau - 1) + 1e-9) for index in range(length + 1)]
        return cls("synthetic", tuple(b - a for a, b in zip(ends, ends[1:])))


class ReplayEngine(Engine):
    """An engine whose iterations accept what a trace says, along one path of the draft.

    Args:
        trace: What was accepted. Sequence b begins a third of the trace behind sequence b - 1.
        spine: The slots of the path that is accepted, the root first; a trace's entry is cut to it.
        Others: As for `Engine`.
    """

    def __init__(
        self, *arguments: Any, trace: AcceptanceTrace, spine: Sequence[int], **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        batch_size, device = len(self.places), self.target.device
        deepest = len(spine) - 1
        counts = torch.tensor(trace.num_accepted).clamp(max=deepest)
        step = max(len(counts) // 3, 1)
        counts = torch.stack([counts.roll(-step * b) for b in range(batch_size)], dim=1)
        slots = torch.full((self.num_slots,), -1)
        slots[: deepest + 1] = torch.tensor(spine)
        paths = slots.expand(*counts.shape, -1)
        paths = paths.masked_fill(torch.arange(self.num_slots) > counts[..., None], -1)
        self.counts = counts
        self._counts = counts.to(device, torch.int32)
        self._paths = paths.to(device, torch.int32)
        self._last = paths.gather(2, counts[..., None]).to(device)  # the last slot of every path
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._plain, self.iteration.accept = self.iteration.accept, self._accept

    def _accept(self, verification: Verification, draft: Draft, cache: SlotCache) -> Judgement:
        """The accept of an iteration, and then what the trace says in place of what it found."""
        found, stats, thresholds = self._plain(verification, draft, cache)
        at = self._at.remainder(len(self._counts))
        last = self._last.index_select(0, at)[0]
        replaced = Acceptance(
            self._paths.index_select(0, at)[0],
            self._counts.index_select(0, at)[0],
            stats.top_ids[..., 0].gather(1, last)[:, 0].long(),
            torch.zeros_like(found.kind),
            torch.zeros_like(found.regret),
        )
        self._at.add_(1)
        return Judgement(replaced, stats, thresholds)

    def replayed(self, first: int, count: int) -> Tensor:
        """int64 `[count, B]`: what iterations `first`, `first + 1`, ... accept."""
        return self.counts[torch.arange(first, first + count) % len(self.counts)]


def spine_of(parents: Sequence[int]) -> tuple[int, ...]:
    """The slots on the way to the deepest one, the root first; of several the lowest slot's."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    slot = depths.index(max(depths))
    path = []
    while slot >= 0:
        path.append(slot)
        slot = parents[slot]
    return tuple(reversed(path))


def begin(
    hf_target: PreTrainedModel,
    hf_draft: PreTrainedModel | None,
    config: DecodeConfig,
    *,
    context: int,
    batch_size: int,
    policy: AcceptancePolicy | None = None,
    trace: AcceptanceTrace | None = None,
) -> Engine:
    """An engine with `batch_size` sequences of `context` tokens each, as after their prefill.

    Args:
        hf_target: Who verifies.
        hf_draft: Who drafts; None: autoregression.
        config: As for `lvspec.generate`.
        context: Tokens of every prompt.
        batch_size: Sequences.
        policy: None: `lvspec()`, whose scores are computed.
        trace: What is accepted; None: what the policy says.
    """
    fuse = config.fuse
    target = RandomPromptModel(hf_target, "target", fuse=fuse)
    draft = None if hf_draft is None else RandomPromptModel(hf_draft, "draft", fuse=fuse)
    drafter = make_drafter(target, draft, config)
    policy = AcceptancePolicy.lvspec() if policy is None else policy
    if trace is None:
        engine = Engine(target, drafter, policy, config, batch_size=batch_size)
    else:
        parents = list(range(-1, drafter.gamma))
        if config.tree is not None:
            parents = drafter.tree.parents
        engine = ReplayEngine(
            target,
            drafter,
            policy,
            config,
            batch_size=batch_size,
            trace=trace,
            spine=spine_of(parents),
        )
    vocabulary = target.vocab_size if draft is None else min(target.vocab_size, draft.vocab_size)
    engine.reserve(context)
    for index in range(batch_size):
        inputs = {"input_ids": random_prompt(context, vocabulary, target.device, seed=index)}
        engine.admit(Request(inputs, None if draft is None else inputs, index))
    return engine
