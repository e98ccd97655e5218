"""DecodeConfig: how to draft and run. What may be accepted is the policy's matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lvspec.tree import MAX_SLOTS


@dataclass(frozen=True)
class DecodeConfig:
    """How a generation is run.

    Args:
        gamma: Draft tokens per verify pass, 1 to 63.
        max_new_tokens: Tokens to generate at most, the end-of-sequence token included, >= 1.
        cache_capacity: Positions of the KV cache. None: what prompt, `max_new_tokens` and one draft
            need. A prompt that does not fit raises ValueError.
        eos_ids: End-of-sequence ids. None: the policy's, or if it has none, those of the target's
            generation config.
        temperature: 0 is greedy: the target's choice is its largest logit. Above 0 the choice is a
            sample of `softmax(logits / temperature)`.
        top_k: Sample from the `top_k` largest logits only, >= 1; None: from all.
        top_p: Sample from the fewest tokens that together have at least this probability, in
            (0, 1]; applied behind `top_k`, as HF does. None: from all.
        seed: Of the samples. A sequence's depend on it, on the index of the request and on nothing
            else. None: drawn from torch's global generator.
        scorer: Visual relevance of a row: a name in `lvspec.relevance.SCORERS`, or a function of
            the target's `StepOutput` that returns float32 `[B, S]`.
        capture: Whether to record the models' passes and replay them without HF's Python (on a
            CPU; see `lvspec.capture`). Modules with hooks are never recorded.
        trace: Whether to keep what happened to every drafted token (`Generation.trace`).

    Raises:
        TypeError: A count is not an integer, or a value not a number.
        ValueError: A value is out of range, or `top_k` or `top_p` is given without a temperature.
    """

    gamma: int = 12
    max_new_tokens: int = 256
    cache_capacity: int | None = None
    eos_ids: tuple[int, ...] | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    scorer: str | Callable[..., Tensor] = "attention_peak"
    capture: bool = True
    trace: bool = False

    def __post_init__(self) -> None:
        _check_count("gamma", self.gamma, most=MAX_SLOTS - 1)
        _check_count("max_new_tokens", self.max_new_tokens)
        if self.cache_capacity is not None:
            _check_count("cache_capacity", self.cache_capacity)
        self._check_sampling()

    @property
    def samples(self) -> bool:
        """Whether the target's choice is a sample."""
        return self.temperature > 0

    def _check_sampling(self) -> None:
        _check_number("temperature", self.temperature)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and not self.samples:
                raise ValueError(
                    f"{name}: expected None with temperature=0, which samples nothing, got "
                    f"{getattr(self, name)}"
                )
        if self.top_k is not None:
            _check_count("top_k", self.top_k)
        if self.top_p is not None:
            _check_number("top_p", self.top_p)
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p: expected a probability in (0, 1], got {self.top_p}")
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int)
        ):
            raise TypeError(f"seed: expected an integer, got {self.seed!r}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {self.seed}")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def _check_count(name: str, value: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1 or (most is not None and value > most):
        wanted = f"from 1 to {most}" if most is not None else ">= 1"
        raise ValueError(f"{name}: expected an integer {wanted}, got {value}")
