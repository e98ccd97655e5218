"""Options by their own names: in errors about what they set, and where one is misspelt."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lvspec.policy import AUTO, MAX_MISMATCHES, MAX_TOP_K

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("int8", "int4", "fp8")
BY_TORCHAO = ("int8", "int4")
CACHE_DTYPES = ("auto", "fp8")
DRAFT_WORDS = ("self", "ngram")
"""What --draft takes besides checkpoints."""

CONFIG_OPTIONS = (
    *("gamma", "acceptance", "cost_ratio", "tree", "draft_keep", "draft_keep_by"),
    *("max_new_tokens", "cache_capacity", "cache_dtype", "temperature", "sample_top_k"),
    *("sample_top_p", "seed"),
)


def anchor_threshold(text: str) -> float | str:
    """The value of `--anchor-threshold`."""
    return text if text == AUTO else float(text)


POLICY_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "anchor_threshold": (
        anchor_threshold,
        "visual relevance from which on a row is an anchor (write =-inf), or auto: found by itself",
    ),
    "anchor_regret": (float, "largest regret in nats of what is loose at an anchor, >= 0"),
    "max_regret": (float, "largest regret in nats elsewhere, >= 0"),
    "top_k": (int, f"the token must be among this many best of the target, 1 to {MAX_TOP_K}"),
    "min_prob": (float, "smallest target probability, above 0 and up to 1"),
    "typical_eps": (float, "epsilon of typical acceptance, above 0 and up to 1"),
    "typical_delta": (float, "delta of typical acceptance, above 0"),
    "min_entropy": (float, "smallest entropy of the best tokens in nats, >= 0"),
    "entropy_top": (int, f"how many tokens --min-entropy looks at, 1 to {MAX_TOP_K} (default 3)"),
    "shift_window": (int, f"how many positions a right token may be off, 0 to {MAX_MISMATCHES}"),
    "shift_regret": (float, "largest regret in nats of a shift, >= 0"),
    "window": (int, f"exact tokens that must follow a mismatch, 0 to {MAX_MISMATCHES}"),
    "max_run": (int, "mismatches in a row at most, >= 1"),
    "regret_budget": (float, "summed regret in nats at most, for each caption, >= 0"),
    "regret_rate": (float, "nats by which --regret-budget grows with every token, >= 0"),
    "path_regret": (float, "tokens that a nat weighs where paths compete, >= 0 (default 1)"),
    "random_share": (float, "share of the rows that are loose by chance, 0 to 1: a baseline"),
    "random_seed": (int, "of that chance, 0 to 65535 (default 0)"),
}
"""Field of `AcceptancePolicy`: its type, and what its option says of it."""

# A name at the head of a message: `top_p: expected …`, `typical_eps, typical_delta: expected …`.
_NAME = re.compile(r"(?<![\w./-])[a-z_]+(?=:|,| \+|$)")


def options_of(fields: Iterable[str], *, prefix: str = "") -> dict[str, str]:
    """Field: option, for options that are called as their field, perhaps behind a prefix."""
    return {field.removeprefix(prefix): f"--{field.replace('_', '-')}" for field in fields}


CALL_OPTIONS = options_of(
    (*CONFIG_OPTIONS, "draft_vocab", "num_frames", "fps", "prompt"), prefix="sample_"
)
"""Field: option, for messages about fields of `DecodeConfig` and of a call."""


def gamma_of(text: str) -> int | str:
    """A number, or "auto", of the option --gamma."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}") from None


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
    """Within this context a ValueError or OSError names options."""
    try:
        yield
    except OSError as error:
        raise type(error)(by_option(error, options)) from error
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
