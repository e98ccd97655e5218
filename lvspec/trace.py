"""What a generation returns, and what happened to every token of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lvspec.stats import DecodeStats

KIND_NAMES = ("exact", "loose", "shift", "bonus")


@dataclass(frozen=True)
class TraceStep:
    """One iteration, on the host.

    Attributes:
        position: Index of the iteration's first output token.
        drafted: The drafted tokens, gamma of them.
        wanted: The target's choice at each slot, gamma + 1 of them.
        relevance: Relevance of each slot's row, or None where it was not computed.
        num_accepted: How many of `drafted` were accepted.
        kinds: Names of the kinds of the accepted ones.
    """

    position: int
    drafted: list[int]
    wanted: list[int]
    relevance: list[float] | None
    num_accepted: int
    kinds: list[str]


class Trace:
    """Everything drafted, wanted and accepted, kept on the device until it is read."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]] = []

    def record(
        self,
        tokens: Tensor,
        wanted: Tensor,
        relevance: Tensor | None,
        accepted: Tensor,
        kind: Tensor,
    ) -> None:
        """Keep one iteration's tensors: `[1, S]` each, `accepted` `[1]`."""
        self._steps.append((tokens, wanted, relevance, accepted, kind))

    def steps(self) -> list[TraceStep]:
        """All iterations, in order."""
        steps, position = [], 1
        for tokens, wanted, relevance, accepted, kind in self._steps:
            count = int(accepted)
            steps.append(
                TraceStep(
                    position=position,
                    drafted=tokens[0, 1:].tolist(),
                    wanted=wanted[0].tolist(),
                    relevance=None if relevance is None else relevance[0].tolist(),
                    num_accepted=count,
                    kinds=[KIND_NAMES[code] for code in kind[0, 1 : count + 1].tolist()],
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
    """

    sequences: Tensor
    tokens: Tensor
    kinds: Tensor
    relevance: Tensor
    stats: DecodeStats
    trace: Trace | None = None
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The new tokens as text, special tokens left out.

        Raises:
            ValueError: `generate` was not given a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("tokenizer: expected one in generate(..., tokenizer=...), got None")
        return self.tokenizer.decode(self.tokens[0], skip_special_tokens=True).strip()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; relevance is null where it was not computed."""
        relevance = [None if value != value else value for value in self.relevance[0].tolist()]
        return {
            "text": self.text if self.tokenizer is not None else None,
            "tokens": self.tokens[0].tolist(),
            "kinds": [KIND_NAMES[code] for code in self.kinds[0].tolist()],
            "relevance": relevance,
            "stats": self.stats.to_dict(),
        }
