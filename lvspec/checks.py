"""Checks of arguments that several files share; each names the argument it refuses."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any


def real(name: str, value: Any) -> float:
    """The number as a float. Raises TypeError if it is none, ValueError if it is NaN."""
    check_number(name, value)
    if math.isnan(value):
        raise ValueError(f"{name}: expected a number, got nan")
    return float(value)


def finite(name: str, value: Any) -> float:
    """As `real`; raises ValueError if it is infinite."""
    number = real(name, value)
    if math.isinf(number):
        raise ValueError(f"{name}: expected a finite number, or None for no limit, got {number}")
    return number


def integer(name: str, value: Any, least: int, most: int | None) -> int:
    """The integer, whatever its type. Raises TypeError or ValueError as `check_count` does."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    check_count(name, number, most, least=least)
    return number


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """The ids, each once, ascending.

    Raises:
        TypeError: They are no collection of integers; names `name`.
        ValueError: One is negative.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected token ids, got {value!r}")
    return tuple(sorted({integer(name, token, 0, None) for token in value}))


def check_count(name: str, value: int, most: int | None = None, *, least: int = 1) -> None:
    """Raise TypeError or ValueError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        wanted = f"from {least} to {most}" if most is not None else f">= {least}"
        raise ValueError(f"{name}: expected an integer {wanted}, got {value}")


def check_number(name: str, value: float) -> None:
    """Raise TypeError unless `value` is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def check_share(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless `value` is a number from 0 to 1."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")


def check_seconds(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless `value` is a number above 0, which may be infinite."""
    if not real(name, value) > 0:
        raise ValueError(f"{name}: expected seconds > 0, got {value}")


def check_type(name: str, value: Any, expected: type) -> None:
    """Raise TypeError unless `value` is of this type."""
    if not isinstance(value, expected):
        raise TypeError(f"{name}: expected {expected.__name__}, got {value!r}")
