"""DecodeConfig: how to draft and run. What may be accepted is the policy's matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lvspec.tree import MAX_SLOTS

KEEP_BY = ("attention", "uniform")


@dataclass(frozen=True)
class DecodeConfig:
    """How a generation is run.

    Args:
        gamma: Draft tokens per verify pass, 1 to 63.
        draft_keep: Share of the prompt's video tokens that the draft's cache keeps, 1.0 to 0.0;
            image tokens count as video. Each keeps its own position, and the text is kept whole.
        draft_keep_by: Which of them: "attention", those that the target looks at from the end of
            the prompt, up to 40 % of that attention, and others at even distances (SpecVLM's rule);
            or "uniform", at even distances.
        ngram_max: The n-gram drafter looks up the last `ngram_max` tokens, then fewer, >= 1.
        max_new_tokens: Tokens to generate at most, the end-of-sequence token included, >= 1.
        cache_capacity: Positions of the KV cache. None: what prompt, `max_new_tokens` and one draft
            need. A prompt that does not fit raises ValueError.
        eos_ids: End-of-sequence ids. None: the policy's, or if it has none, those of the target's
            generation config.
        scorer: Visual relevance of a row: a name in `lvspec.relevance.SCORERS`, or a function of
            the target's `StepOutput` that returns float32 `[B, S]`.
        capture: Whether to record the models' passes and replay them without HF's Python (on a
            CPU; see `lvspec.capture`). Modules with hooks are never recorded.
        trace: Whether to keep what happened to every drafted token (`Generation.trace`).

    Raises:
        TypeError: A count is not an integer, or a share not a number.
        ValueError: A value is out of range.
    """

    gamma: int = 12
    draft_keep: float = 1.0
    draft_keep_by: Literal["attention", "uniform"] = "attention"
    ngram_max: int = 3
    max_new_tokens: int = 256
    cache_capacity: int | None = None
    eos_ids: tuple[int, ...] | None = None
    scorer: str | Callable[..., Tensor] = "attention_peak"
    capture: bool = True
    trace: bool = False

    def __post_init__(self) -> None:
        _check_count("gamma", self.gamma, most=MAX_SLOTS - 1)
        _check_share("draft_keep", self.draft_keep)
        if self.draft_keep_by not in KEEP_BY:
            raise ValueError(
                f"draft_keep_by: expected one of {', '.join(KEEP_BY)}, got {self.draft_keep_by!r}"
            )
        _check_count("ngram_max", self.ngram_max)
        _check_count("max_new_tokens", self.max_new_tokens)
        if self.cache_capacity is not None:
            _check_count("cache_capacity", self.cache_capacity)


def _check_count(name: str, value: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1 or (most is not None and value > most):
        wanted = f"from 1 to {most}" if most is not None else ">= 1"
        raise ValueError(f"{name}: expected an integer {wanted}, got {value}")


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
