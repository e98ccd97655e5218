"""Keyword arguments that belong elsewhere: to DecodeConfig, to a policy, or to HF's `generate`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from transformers import GenerationConfig

from lvspec.config import DecodeConfig
from lvspec.policy import AcceptancePolicy

_CONFIG = frozenset(field.name for field in fields(DecodeConfig))
_POLICY = frozenset(field.name for field in fields(AcceptancePolicy)) - {"name", "eos_ids"}
_INSTEAD = {
    "assistant_model": "the draft as second argument",
    "attention_mask": "it in inputs",
    "custom_generate": "it to target.generate: lvspec.generate is no custom_generate",
    "do_sample": "config=lvspec.DecodeConfig(temperature=...), which samples",
    "eos_token_id": "config=lvspec.DecodeConfig(eos_ids=(...,))",
    "max_length": "config=lvspec.DecodeConfig(max_new_tokens=...), which does not count the prompt",
    "num_return_sequences": "the prompt several times, as a list",
    "prompt_lookup_num_tokens": 'draft="ngram" and config=lvspec.DecodeConfig(gamma=...)',
}
"""What to give in place of what HF's `generate` takes by another name."""


def refuse_keywords(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Say where an argument goes that `function` does not have.

    Raises:
        TypeError: There is one in `given`; names the first of them.
    """
    for name, value in given.items():
        raise TypeError(
            f"{name}: expected {_expected(function, name, value)}, got it as a keyword of "
            f"{function.__qualname__.removesuffix('.__init__')}"
        )


def _expected(function: Callable[..., Any], name: str, value: Any) -> str:
    written = f"{name}={value!r}" if isinstance(value, (bool, int, float, str)) else f"{name}=..."
    ways = []
    if name in _CONFIG:
        ways.append(f"config=lvspec.DecodeConfig({written})")
    if name in _POLICY:
        ways.append(f"policy=lvspec.AcceptancePolicy.lvspec({written})")
    if len(ways) == 2:
        return f"{ways[0]} to sample from fewer tokens, or {ways[1]} to accept among fewer"
    if ways:
        return ways[0]
    if name in _INSTEAD:
        return _INSTEAD[name]
    if name in vars(GenerationConfig()):
        return "it in target.generation_config, or as one of logits_processor"
    own = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is not parameter.empty
    ]
    close = difflib.get_close_matches(name, [*own, *sorted(_CONFIG | _POLICY)], n=1)
    if close and close[0] not in own:
        return _expected(function, close[0], value)
    return close[0] if close else f"one of {', '.join(own)}"
