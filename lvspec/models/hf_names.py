"""What transformers calls things: the one place that knows where its versions differ."""

from __future__ import annotations

from inspect import signature
from typing import Any

from transformers import Cache, GenerationMixin, __version__

CACHE_NAMES = ("cache", "past_key_values")
"""What a forward calls the cache that it is given: since 5.24, and before."""


def _cache_name() -> str:
    taken = signature(GenerationMixin.prepare_inputs_for_generation).parameters
    for name in CACHE_NAMES:
        if name in taken:
            return name
    raise ImportError(
        f"transformers: expected a version that calls the cache {' or '.join(CACHE_NAMES)}, got "
        f"{__version__}, which calls it otherwise; an older one is needed"
    )


CACHE: str = _cache_name()
"""The one of them that the installed version has, in arguments of forwards and of `generate`."""


def caches_in(prepared: dict[str, Any]) -> dict[str, Cache]:
    """Of what `generate` has prepared, the caches, by whatever name.

    A later version may have another one: a cache that goes on to the forward beside ours wins.
    """
    return {name: value for name, value in prepared.items() if isinstance(value, Cache)}
