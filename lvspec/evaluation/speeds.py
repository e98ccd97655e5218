"""Speeds of captions, and of one method over another's on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, Protocol


class Timed(Protocol):
    """One caption: new tokens, passes of the target behind the prefill, seconds in all, and those
    without the prefill where they are known."""

    @property
    def tokens(self) -> int: ...
    @property
    def passes(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def decode_seconds(self) -> float | None: ...


def speeds(mine: Sequence[Timed], reference: Sequence[Timed]) -> dict[str, Any]:
    """Medians over captions, and tau over all of them.

    Args:
        mine: Captions, at least one.
        reference: Those of the method to compare with, of the same prompts.

    Returns:
        `tokens_per_s` and `speedup` with the prefill, `decode_speedup` without it (None where it is
        not known), `tau`: tokens per pass of the target, the bonus token included.
    """
    pairs = list(zip(mine, reference, strict=True))
    passes = sum(caption.passes for caption in mine)
    # The first token comes from the prefill and costs no pass.
    tokens = sum(caption.tokens - 1 for caption in mine)
    decoding = [
        _decode_speed(one) / _decode_speed(other)
        for one, other in pairs
        if _decode_speed(one) and _decode_speed(other)
    ]
    return {
        "tokens_per_s": median(caption.tokens / caption.seconds for caption in mine),
        "speedup": median(
            (one.tokens / one.seconds) / (other.tokens / other.seconds) for one, other in pairs
        ),
        "decode_speedup": median(decoding) if decoding else None,
        "tau": tokens / passes if passes else None,
    }


def _decode_speed(caption: Timed) -> float | None:
    """Tokens/s behind the prefill; None where that is not known, 0 where there were none."""
    seconds = caption.decode_seconds
    return (caption.tokens - 1) / seconds if seconds else None
