"""A caption token by token: what was drafted, wanted and accepted, in words that a page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lvspec.engine.result import TraceStep
from lvspec.reference.kinds import KIND_NAMES

REJECTED, UNUSED = "rejected", "unused"


@dataclass(frozen=True)
class Choice:
    """One of the target's best tokens at a row.

    Attributes:
        text: Of the token.
        probability: By the target, 0 to 1.
        is_taken: Whether it is the one that was output.
    """

    text: str
    probability: float
    is_taken: bool


@dataclass(frozen=True)
class Token:
    """One output token; what only a trace tells is None, or empty, without one.

    Attributes:
        index: From 0.
        text: What it adds to the caption, empty for a special token.
        name: What it is called, for one without text.
        kind: One of `KIND_NAMES`.
        relevance: Of the row that predicted it.
        threshold: Relevance from which on that row was an anchor; -inf where all were, inf where
            none was.
        is_anchor: Whether it was held for one.
        iteration: Which predicted it, from 1.
        wanted: The target's own choice at that row.
        regret: Nats lost by taking another one.
        probability: Of the token, by the target.
        entropy: Of the row, nats.
        best: The target's best tokens there.
        rejected: Drafted there and not accepted.
    """

    index: int
    text: str
    name: str
    kind: str
    relevance: float | None
    is_anchor: bool
    threshold: float | None = None
    iteration: int | None = None
    wanted: str | None = None
    regret: float | None = None
    probability: float | None = None
    entropy: float | None = None
    best: tuple[Choice, ...] = ()
    rejected: tuple[str, ...] = ()


@dataclass(frozen=True)
class Iteration:
    """One iteration.

    Attributes:
        number: From 1.
        drafted: How many tokens were.
        accepted: How many of these were.
        chips: (text, kind) of what was drafted, in order; kinds besides `KIND_NAMES` are
            `REJECTED`, and `UNUSED` for what stood behind a rejected token.
        threshold: Of its rows.
    """

    number: int
    drafted: int
    accepted: int
    chips: tuple[tuple[str, str], ...]
    threshold: float


@dataclass(frozen=True)
class Caption:
    """What a page shows of one result.

    Attributes:
        result: As it was read.
        tokens, iterations: In order; no iterations without a trace.
        steps: The trace, or nothing.
    """

    result: Mapping[str, Any]
    tokens: tuple[Token, ...]
    iterations: tuple[Iteration, ...] = ()
    steps: tuple[TraceStep, ...] = ()

    @property
    def video(self) -> str:
        return str(self.result.get("video") or "")

    @property
    def stats(self) -> Mapping[str, Any]:
        return self.result.get("stats") or {}

    @property
    def counts(self) -> dict[str, int]:
        """How many tokens are of each kind, and how many drafted ones were rejected, if known."""
        counts = {name: sum(t.kind == name for t in self.tokens) for name in KIND_NAMES}
        known = self.stats.get("counts") or {}
        return {**counts, **{name: n for name, n in known.items() if name == REJECTED}}

    @property
    def mass(self) -> list[list[float | None]]:
        """Attention of each token on each group of frames, where it was written."""
        frames = self.result.get("frames") or {}
        return frames.get("mass") or []


def read_caption(result: Mapping[str, Any], where: str) -> Caption:
    """A result with a caption.

    Args:
        result: As `Generation.to_dict` has it.
        where: What to call it in messages.

    Raises:
        ValueError: It is not what lvspec writes.
    """
    try:
        steps = tuple(TraceStep.from_dict(step) for step in result.get("trace") or ())
        caption = _Reader(result, steps).caption()
        frames = result.get("frames") or {}
        if frames.get("mass") is not None and len(frames["mass"]) != len(caption.tokens):
            raise ValueError(f"frames of {len(frames['mass'])} tokens")
        return caption
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: expected a result as lvspec writes it, got {type(error).__name__}: {error}"
        ) from error


@dataclass
class _Reader:
    result: Mapping[str, Any]
    steps: Sequence[TraceStep]
    names: dict[int, str] = field(default_factory=dict)

    def caption(self) -> Caption:
        result = self.result
        ids = list(result["tokens"])
        pieces = result.get("pieces") or [None] * len(ids)
        self.names = {int(token): text for token, text in (result.get("vocabulary") or {}).items()}
        kinds, relevance = result.get("kinds") or [None] * len(ids), result.get("relevance")
        relevance = relevance or [None] * len(ids)
        anchors = result.get("anchors") or [False] * len(ids)
        for name, values in (("pieces", pieces), ("kinds", kinds), ("relevance", relevance)):
            if len(values) != len(ids):
                raise ValueError(f"{len(values)} {name} of {len(ids)} tokens")
        traced = self._traced(len(ids))
        tokens = []
        for index, token in enumerate(ids):
            name = self._name(token)
            found = traced.get(index, {})
            tokens.append(
                Token(
                    index=index,
                    text=name if pieces[index] is None else pieces[index],
                    name=name,
                    kind=kinds[index] or "target",
                    relevance=_number(relevance[index]),
                    is_anchor=bool(anchors[index]),
                    **found,
                )
            )
        iterations = tuple(self._iteration(i, step) for i, step in enumerate(self.steps, 1))
        return Caption(result, tuple(tokens), iterations, tuple(self.steps))

    def _name(self, token: int) -> str:
        return self.names.get(token) or f"#{token}"

    def _traced(self, count: int) -> dict[int, dict[str, Any]]:
        """Of every output token what the trace says of it."""
        found = {}
        for number, step in enumerate(self.steps, 1):
            row = 0
            for offset, slot in enumerate([*step.path, None]):
                index = step.position + offset
                if index < count:
                    found[index] = self._at(number, step, row, slot)
                row = slot
        return found

    def _at(self, number: int, step: TraceStep, row: int, slot: int | None) -> dict[str, Any]:
        """What stands at a row, of which the token in `slot` was taken, or for None the bonus."""
        drafted = [t for t, parent in enumerate(step.parents, 1) if parent == row and t != slot]
        taken = step.wanted[row] if slot is None else step.drafted[slot - 1]
        best = [
            Choice(self._name(token), math.exp(log_prob), token == taken)
            for token, log_prob in zip(step.top_ids[row], step.top_log_probs[row])
        ]
        own = [choice.probability for choice in best if choice.is_taken]
        probability = math.exp(step.log_probs[slot - 1]) if slot is not None else (own or [None])[0]
        return {
            "threshold": None if step.relevance is None else step.anchor_threshold,
            "iteration": number,
            "wanted": self._name(step.wanted[row]),
            "regret": 0.0 if slot is None else max(step.regrets[slot - 1], 0.0),
            "probability": probability,
            "entropy": step.entropies[row],
            "best": tuple(best),
            "rejected": tuple(self._name(step.drafted[t - 1]) for t in drafted),
        }

    def _iteration(self, number: int, step: TraceStep) -> Iteration:
        kinds = dict(zip(step.path, step.kinds))
        taken = {0, *step.path}
        chips = []
        for slot, (token, parent) in enumerate(zip(step.drafted, step.parents), 1):
            kind = kinds.get(slot) or (REJECTED if parent in taken else UNUSED)
            chips.append((self._name(token), kind))
        bonus = self._name(step.wanted[step.path[-1] if step.path else 0])
        chips.append((bonus, "bonus"))
        return Iteration(
            number, len(step.drafted), step.num_accepted, tuple(chips), step.anchor_threshold
        )


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
