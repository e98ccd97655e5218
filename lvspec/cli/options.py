"""Options by their own names: in errors about what they set, and where one is misspelt."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

DRAFT_WORDS = ("self", "ngram")
"""What --draft takes besides checkpoints."""

# A name at the head of a message: `top_p: expected …`, `typical_eps, typical_delta: expected …`.
_NAME = re.compile(r"(?<![\w./-])[a-z_]+(?=:|,| \+|$)")


def options_of(fields: Iterable[str], *, prefix: str = "") -> dict[str, str]:
    """Field: option, for options that are called as their field, perhaps behind a prefix."""
    return {field.removeprefix(prefix): f"--{field.replace('_', '-')}" for field in fields}


def by_option(message: object, options: Mapping[str, str]) -> str:
    """A message with the options for the fields that it is about.

    >>> by_option("top_p: expected at most 1, got 2", {"top_p": "--sample-top-p"})
    '--sample-top-p: expected at most 1, got 2'
    """
    head, expected, rest = str(message).partition(": expected")
    head = _NAME.sub(lambda found: options.get(found[0], found[0]), head) if expected else head
    return f"{head}{expected}{rest}"


@contextmanager
def errors_by_option(options: Mapping[str, str]) -> Iterator[None]:
    """Within this context a ValueError names options."""
    try:
        yield
    except ValueError as error:
        raise ValueError(by_option(error, options)) from error


def unknown_options(words: Sequence[str], known: Iterable[str]) -> list[str]:
    """Words that look like long options and are none of `known`, nor the beginning of one."""
    names = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
    known = list(known)
    return [name for name in names if not any(option.startswith(name) for option in known)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean --video?`, or nothing if no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""
