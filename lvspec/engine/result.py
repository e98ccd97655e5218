"""What a generation returns, and what happened to every token of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lvspec.engine.stats import DecodeStats
from lvspec.engine.token_text import names, pieces
from lvspec.phases.outcome import Traced
from lvspec.reference.kinds import KIND_NAMES


@dataclass(frozen=True)
class TraceStep:
    """One iteration, on the host: all that was verified.

    What the last one accepted may reach beyond the output, see `DecodeStats`.

    Attributes:
        position: Index of the iteration's first output token.
        drafted: The drafted tokens, those of slots 1, 2, ....
        parents: The slot before each of them; `[0, 1, 2, ...]` for a chain.
        wanted: The target's choice at each slot, one more than `drafted`.
        relevance: Relevance of each slot's row, or None where it was not computed.
        anchor_threshold: Relevance from which on a row was an anchor: -inf where all were, inf
            where none was.
        path: The accepted slots, in order, without the root.
        kinds: Names of their kinds.
        log_probs: Of each drafted token in the row of the slot before it, nats.
        regrets: By how much the best token of that row is better, nats.
        entropies: Of each slot's row, nats.
        top_ids: The target's five best tokens of each slot's row, best first (where it samples,
            the sample first).
        top_log_probs: Of those, nats.
    """

    position: int
    drafted: list[int]
    parents: list[int]
    wanted: list[int]
    relevance: list[float] | None
    anchor_threshold: float
    path: list[int]
    kinds: list[str]
    log_probs: list[float]
    regrets: list[float]
    entropies: list[float]
    top_ids: list[list[int]]
    top_log_probs: list[list[float]]

    @property
    def num_accepted(self) -> int:
        return len(self.path)

    @property
    def token_ids(self) -> set[int]:
        """Every token that is spoken of."""
        best = (token for row in self.top_ids for token in row)
        return {*self.drafted, *self.wanted, *best}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: what is no finite number is text, such as "-inf"."""
        return {name: _to_json(value) for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TraceStep:
        """The inverse of `to_dict`.

        Raises:
            ValueError: A field is missing, or there are others.
        """
        names = [field.name for field in fields(cls)]
        if sorted(values) != sorted(names):
            raise ValueError(
                f"trace: expected steps with {', '.join(names)}, got {', '.join(values)}"
            )
        return cls(**{name: _from_json(name, value) for name, value in values.items()})


class Trace:
    """Everything drafted, wanted and accepted, kept on the device until it is read.

    Args:
        place: Which sequence of the batch.
    """

    def __init__(self, place: int = 0) -> None:
        self._place = place
        self._steps: list[Traced] = []

    def add(self, traced: Traced) -> None:
        """Keep one iteration's tensors."""
        self._steps.append(traced)

    def steps(self) -> list[TraceStep]:
        """All iterations, in order."""
        steps, position, place = [], 1, self._place
        for draft, wanted, relevance, thresholds, acceptance, rows in self._steps:
            slots = int(draft.shape.num_slots[place])
            count = int(acceptance.num_accepted[place])
            kinds = acceptance.kind[place, 1 : count + 1].tolist()
            steps.append(
                TraceStep(
                    position=position,
                    drafted=draft.tokens[place, 1:slots].tolist(),
                    parents=draft.shape.parents[place, 1:slots].tolist(),
                    wanted=wanted[place, :slots].tolist(),
                    relevance=None if relevance is None else relevance[place, :slots].tolist(),
                    anchor_threshold=float(thresholds[place]),
                    path=acceptance.path[place, 1 : count + 1].tolist(),
                    kinds=[KIND_NAMES[code] for code in kinds],
                    log_probs=rows.log_probs[place, 1:slots].tolist(),
                    regrets=rows.regrets[place, 1:slots].tolist(),
                    entropies=rows.entropy[place, :slots].tolist(),
                    top_ids=rows.top_ids[place, :slots].tolist(),
                    top_log_probs=rows.top_log_probs[place, :slots].tolist(),
                )
            )
            position += count + 1
        return steps


@dataclass
class Generation:
    """The result of `lvspec.generate`.

    Attributes:
        sequences: int64 `[1, T + new]`, prompt and new tokens, as HF's `generate` returns them.
        tokens: int64 `[1, new]`, the new tokens, the end-of-sequence token included.
        kinds: uint8 `[1, new]`, index into `KIND_NAMES`: an exact, loose or shifted draft token, or
            a bonus token that the target chose itself. The first token is the prefill's: a bonus.
        relevance: float32 `[1, new]`, visual relevance of the row that predicted the token; NaN
            for the first token and where the policy did not need it.
        stats: Counters and times; read from the device when asked for.
        trace: Every iteration, with `DecodeConfig(trace=True)`, else None.
        tokenizer: What `text` decodes with.
        index: Which of the requests this answers, from 0.
        anchors: bool `[1, new]` on the CPU, whether the row that predicted the token was held for
            an anchor; False for the first token and without a visual gate.
    """

    sequences: Tensor
    tokens: Tensor
    kinds: Tensor
    relevance: Tensor
    stats: DecodeStats
    trace: Trace | None = None
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)
    index: int = 0
    anchors: Tensor | None = None

    @property
    def text(self) -> str:
        """The new tokens as text, special tokens left out.

        Raises:
            ValueError: `generate` was not given a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("tokenizer: expected one in generate(..., tokenizer=...), got None")
        return self.tokenizer.decode(self.tokens[0], skip_special_tokens=True).strip()

    @property
    def pieces(self) -> list[str]:
        """The text that each new token adds, special tokens left out: joined and stripped, `text`.

        Raises:
            ValueError: `generate` was not given a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("tokenizer: expected one in generate(..., tokenizer=...), got None")
        return pieces(self.tokens[0].tolist(), self.tokenizer)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; relevance is null where it was not computed.

        With a trace, `trace` has its steps, see `TraceStep.to_dict`, and with a tokenizer
        `vocabulary` the text of every token in them, by its id.
        """
        text, words = None, None
        if self.tokenizer is not None:
            text, words = self.text, self.pieces
        traced = {}
        if self.trace is not None:
            steps = self.trace.steps()
            traced["trace"] = [step.to_dict() for step in steps]
            if self.tokenizer is not None:
                ids = {token for step in steps for token in step.token_ids}
                known = names(ids | set(self.tokens[0].tolist()), self.tokenizer)
                traced["vocabulary"] = {str(token): name for token, name in known.items()}
        relevance = [None if value != value else value for value in self.relevance[0].tolist()]
        return {
            "text": text,
            "pieces": words,
            "tokens": self.tokens[0].tolist(),
            "kinds": [KIND_NAMES[code] for code in self.kinds[0].tolist()],
            "relevance": relevance,
            "anchors": None if self.anchors is None else self.anchors[0].tolist(),
            "stats": self.stats.to_dict(),
            **traced,
        }


def _to_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_json(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(name: str, value: Any) -> Any:
    if name == "kinds":
        return list(value)
    if isinstance(value, list):
        return [_from_json(name, each) for each in value]
    return float(value) if isinstance(value, str) else value
