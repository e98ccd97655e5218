"""How long chains are, where that is not said: by what passes cost and what was accepted so far.

The choice is made when a run begins, so that no token depends on a later one, and is kept for all
runs of these models, policy and batch. It is made from a guess of the acceptance at first, and once
again as soon as enough tokens were put to the test: then it is known how long the texts are, too.
Where the target samples, a token depends on where chains end: so that a seed repeats a caption,
nothing is measured or learnt then, and the bytes of the weights decide.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lvspec.config import DecodeConfig
from lvspec.engine.pace import Pace, measure_pace
from lvspec.engine.stats import DecodeStats
from lvspec.models.model import Model
from lvspec.phases.draft.chain import PIECE
from lvspec.phases.draft.cost import MOST, best_gamma, speedup, text_costs
from lvspec.phases.draft.factory import cost_ratio_of_bytes, draft_source
from lvspec.phases.draft.model_cache import DraftSource
from lvspec.policy import AcceptancePolicy

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 63)
"""Between these the noise of a measurement decides nothing; each is captured anew."""

EXACT, LOOSE = 0.8, 0.95
"""Acceptance that is guessed: of a policy that lets no mismatch pass, and of any other."""

ENOUGH = 256
"""Drafted tokens put to the test from which on their acceptance is known."""

TEXTS = 64
"""Of so many texts the lengths are kept."""

LONGEST = 512
"""Of a longer text the end hardly matters."""

NEARLY = (0.9, 1.0, 1.1)
"""Shares of a length that the next texts may have."""


@dataclass(frozen=True)
class GammaChoice:
    """A length of chains, and why.

    Attributes:
        gamma: Draft tokens of a chain.
        by: Where its costs are from: "measured"; "cost_ratio", that of the config; or "bytes", of
            the weights, where there was nothing to measure or the target samples.
        cost_ratio: A step of the draft in passes of the target over one row; beside such a pass
            stands what else an iteration takes, where runs on a CPU have shown that.
        row_ratio: What a further row of the target adds, in the same; 0 where it is not known.
        acceptance: Chance that a drafted token is accepted.
        acceptance_by: "config", "policy" (a guess) or "generations", those before this one.
        text_length: Tokens of a text, where those before this one said so: the mean; else None, and
            the choice is for texts without an end.
    """

    gamma: int
    by: Literal["measured", "cost_ratio", "bytes"]
    cost_ratio: float
    row_ratio: float
    acceptance: float
    acceptance_by: Literal["config", "policy", "generations"]
    text_length: float | None = None

    @property
    def is_settled(self) -> bool:
        """Whether it stays as it is whatever is accepted from now on."""
        return self.acceptance_by != "policy"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass
class _Known:
    """What is known of two models.

    Attributes:
        paces: Of passes.
        rests: Seconds of accepting and committing, of an iteration of those that had least.
        seen: Tokens accepted and tokens tested.
        lengths: Tokens of the last texts.
        chosen: Lengths of chains.
    """

    paces: dict[Hashable, Pace | None] = field(default_factory=dict)
    rests: dict[Hashable, float] = field(default_factory=dict)
    seen: dict[Hashable, tuple[int, int]] = field(default_factory=dict)
    lengths: dict[Hashable, deque[int]] = field(default_factory=dict)
    chosen: dict[Hashable, GammaChoice] = field(default_factory=dict)


_KNOWN: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, _Known]] = WeakKeyDictionary()


class ChainLength:
    """The length of chains of one pair of models, policy and config.

    Args:
        target: Who verifies.
        draft: Who drafts beside it, or "self".
        policy: What is accepted.
        config: `chooses_gamma` is true of it.
        batch_size: Sequences that are decoded together.
    """

    def __init__(
        self,
        target: Model,
        draft: Model | Literal["self"],
        policy: AcceptancePolicy,
        config: DecodeConfig,
        *,
        batch_size: int,
    ) -> None:
        self._target, self._draft = target, draft
        self._policy, self._config, self._batch_size = policy, config, batch_size
        model = target if isinstance(draft, str) else draft
        by_draft = _KNOWN.setdefault(target.text, WeakKeyDictionary())
        self._known = by_draft.setdefault(model.text, _Known())
        models = tuple((m.text.dtype, m.device, m.step_bytes) for m in (target, model))
        ways = (config.draft_keep, config.draft_keep_by, config.draft_vocab)
        self._key = (models, isinstance(draft, str), policy, *ways, config.samples)
        self._pace_key = (models, batch_size, policy.needs_relevance, config.draft_vocab)
        self._pace_key += (config.capture, config.fuse, config.cache_dtype)

    def choose(self) -> GammaChoice:
        """What is best now; of the same answer for as long as not much was learnt."""
        config, known = self._config, self._known
        most = min(MOST, max(config.max_new_tokens - 1, 1))
        key = (*self._key, *self._pace_key, most, config.cost_ratio, config.acceptance)
        choice = known.chosen.get(key)
        is_enough = known.seen.get(self._key, (0, 0))[1] >= ENOUGH
        if choice is None or (is_enough and not choice.is_settled):
            choice = known.chosen[key] = self._best(most)
        return choice

    @property
    def _guess(self) -> float:
        return EXACT if self._policy.is_exact else LOOSE

    def learn(self, stats: DecodeStats) -> None:
        """A generation with a chosen length is over."""
        if stats.is_gated and stats.is_text:
            return  # decoded strictly: that says nothing of the policy
        accepted, tested = self._known.seen.get(self._key, (0, 0))
        seen = accepted + stats.num_passed, tested + stats.num_tested
        self._known.seen[self._key] = seen
        if stats.num_emitted:
            lengths = self._known.lengths.setdefault(self._key, deque(maxlen=TEXTS))
            lengths.append(stats.num_emitted)
        # (On a GPU this is little of a graph, and to look at the clock is to wait for the device.)
        if self._target.device.type == "cpu" and stats.num_iterations:
            seconds, rests = stats.seconds, self._known.rests
            rest = (seconds["accept"] + seconds["commit"]) / stats.num_iterations
            rests[self._pace_key] = min(rest, rests.get(self._pace_key, rest))

    def _best(self, most: int) -> GammaChoice:
        acceptance, said_by = self._acceptance()
        given = self._config.cost_ratio
        if given is not None:
            gamma = best_gamma(acceptance, given, most)
            return GammaChoice(gamma, "cost_ratio", given, 0.0, acceptance, said_by)
        source = draft_source(self._target, self._draft, self._config, self._policy.eos_ids)
        pace = None if self._config.samples else self._pace(source)
        if pace is None:
            ratio = cost_ratio_of_bytes(self._target, source)
            gamma = best_gamma(acceptance, ratio, most)
            return GammaChoice(gamma, "bytes", ratio, 0.0, acceptance, said_by)
        if said_by == "generations":
            pace = replace(pace, rest=self._known.rests.get(self._pace_key, 0.0))
        ratios = pace.cost_ratio, pace.row_ratio
        known = self._known.lengths.get(self._key) if said_by == "generations" else None
        texts = tuple(known or ())  # another thread may learn meanwhile
        lengths = torch.tensor([min(length, LONGEST) for length in texts])
        nearly = torch.cat([(lengths * share).ceil().long() for share in NEARLY])

        def worth(gamma: int) -> float:
            if not len(nearly):
                return speedup(acceptance, gamma, ratios[0], row_ratio=ratios[1])
            piece = PIECE if self._target.device.type == "cpu" else 0
            costs = text_costs(acceptance, gamma, int(nearly.max()), *ratios, piece)
            return -float(costs[nearly].sum())

        gamma = max((length for length in LENGTHS if length <= most), key=worth)
        mean = float(lengths.double().mean()) if texts else None
        return GammaChoice(gamma, "measured", *ratios, acceptance, said_by, mean)

    def _pace(self, source: DraftSource) -> Pace | None:
        known = self._known.paces
        if self._pace_key not in known:
            known[self._pace_key] = measure_pace(
                self._target,
                source,
                batch_size=self._batch_size,
                scores=self._policy.needs_relevance,
                capture=self._config.capture,
            )
        return known[self._pace_key]

    def _acceptance(self) -> tuple[float, Literal["config", "policy", "generations"]]:
        if self._config.acceptance is not None:
            return self._config.acceptance, "config"
        if self._config.samples:
            return self._guess, "policy"
        accepted, tested = self._known.seen.get(self._key, (0, 0))
        if tested < ENOUGH:
            return self._guess, "policy"
        return (accepted + 0.5) / (tested + 1), "generations"
