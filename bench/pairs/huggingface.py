"""What HuggingFace's `generate` takes for a token, by the same weights over the same cache.

A call begins with a cache that holds the whole prompt but its last token, so that no prompt is
read; only assisted generation, which goes wrong behind such a cache, reads it. Tokens and rounds
are timed one by one, so what a call costs once is in no figure.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache, StoppingCriteriaList

from lvspec.models.cache import SlotCache
from lvspec.models.hf_names import CACHE
from lvspec.models.model import Model

Cache = DynamicCache | StaticCache


def dynamic_cache(model: Model, cache: SlotCache, length: int) -> DynamicCache:
    """HF's cache with the first `length` positions of every sequence; copies."""
    theirs = DynamicCache(config=model.hf.config)
    return _filled(theirs, cache, length)


def static_cache(model: Model, cache: SlotCache, length: int, capacity: int) -> StaticCache:
    """HF's cache of `capacity` positions, the first `length` of them filled."""
    theirs = StaticCache(config=model.hf.config, max_cache_len=capacity)
    return _filled(theirs, cache, length)


def _filled(theirs: Cache, cache: SlotCache, length: int) -> Cache:
    for layer in range(cache.k.shape[0]):
        rows = (x[layer, :, :, :length].clone() for x in (cache.k, cache.v))
        theirs.update(*rows, layer)
    return theirs


def greedy(
    model: PreTrainedModel, ids: Tensor, cache: Cache | None, count: int, **options: Any
) -> Tensor:
    """int64 `[B, count]`: HF's greedy tokens behind `ids`, `[B, T]`.

    Args:
        cache: Holds all of `ids` but the last token, and is changed; None: `generate` reads them.
        options: Of `generate`.
    """
    options |= {} if cache is None else {CACHE: cache}
    model.model.rope_deltas = None  # state that an earlier call has left
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        **options,
    )
    return found[:, ids.shape[1] :]


class _Clock:
    """A stopping criterion that only looks at the clock, once for every round of `generate`.

    HF's loop reads from the device in every round, so rounds are as far apart as these looks.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.times: list[float] = []

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.full((len(ids),), len(self.times) >= self.most, device=ids.device)

    def seconds(self, skip: int) -> list[float]:
        """Of every round but the first `skip` and the one that reads the prompt."""
        times = self.times[skip:]
        return [following - time_ for time_, following in zip(times, times[1:])]


def token_seconds(
    model: PreTrainedModel, ids: Tensor, cache: Cache, count: int, *, skip: int = 3
) -> list[float]:
    """Seconds of each of `count` tokens behind `ids`; `skip` more come first.

    Args:
        ids, cache: As for `greedy`.
    """
    clock = _Clock(count + skip + 1)
    criteria = StoppingCriteriaList([clock])
    greedy(model, ids, cache, count + skip + 1, stopping_criteria=criteria)
    return clock.seconds(skip)


def assisted_rounds(
    model: PreTrainedModel, draft: PreTrainedModel, ids: Tensor, *, gamma: int, count: int
) -> tuple[list[float], Tensor]:
    """Seconds of each of `count` rounds of assisted generation, and its tokens.

    A round is the draft's `gamma` passes, the target's over `gamma + 1` rows, and what follows; the
    target's calls are as far apart as rounds are.

    Args:
        ids: int64 `[1, T]`, the prompt.
    """
    calls: list[tuple[float, int]] = []

    def seen(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        calls.append((time.perf_counter(), options["inputs_embeds"].shape[1]))

    def enough(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), len(calls) >= count + 2, device=ids.device)

    config = draft.generation_config
    config.num_assistant_tokens = gamma
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0  # or it would stop where it is unsure
    criteria = StoppingCriteriaList([enough])
    options = {"assistant_model": draft, "stopping_criteria": criteria}
    # Not by a criterion: those are asked of candidates as well, in some versions.
    hook = model.model.language_model.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        with _same_vocabulary(model, draft):
            tokens = greedy(model, ids, None, (count + 3) * (gamma + 1), **options)
    finally:
        hook.remove()
    seconds = [
        following[0] - call[0]
        for call, following in zip(calls, calls[1:])
        if call[1] == following[1] == gamma + 1
    ]
    return seconds, tokens


@contextmanager
def _same_vocabulary(model: PreTrainedModel, draft: PreTrainedModel) -> Iterator[None]:
    """HF refuses a draft whose vocabulary is padded differently, by its config alone."""
    config = draft.config.get_text_config()
    before = config.vocab_size
    config.vocab_size = model.config.get_text_config().vocab_size
    try:
        yield
    finally:
        config.vocab_size = before
