"""What `generate` and `generate_many` are given, one entry a prompt."""

from __future__ import annotations

from typing import Any


class Late:
    """In place of a request that is not there yet."""


LATE = Late()


def as_tuple(each: Any) -> tuple[Any, ...]:
    """Inputs, draft inputs and policy of one prompt, as many of them as were given."""
    if not isinstance(each, tuple):
        return (each,)
    if not 1 <= len(each) <= 3:
        raise ValueError(
            "inputs: expected a prompt, (prompt, draft's prompt) or (prompt, draft's prompt, "
            f"policy), got a tuple of {len(each)}"
        )
    return each


def one_each(name: str, value: Any, count: int, is_batch: bool) -> list[Any]:
    """One entry for each of `count` prompts."""
    if value is None:
        return [None] * count
    if is_batch != isinstance(value, (list, tuple)):
        expected = f"a list of {count}, one a prompt" if is_batch else "one, for a single prompt"
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    values = list(value) if is_batch else [value]
    if len(values) != count:
        raise ValueError(f"{name}: expected {count} entries, one a prompt, got {len(values)}")
    return values
