"""What HuggingFace's `generate` takes for a token, by the same weights over the same cache.

A call begins with a cache that holds the whole prompt but its last token, so no prompt is read, and
a figure is the difference of two calls of different lengths: what a call costs once drops out.
Assisted generation goes wrong behind such a cache, so it reads its prompt, and its rounds are told
apart by when the target is called.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache, StoppingCriteriaList

from lvspec.cache import SlotCache
from lvspec.models import Model

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
    options |= {} if cache is None else {"past_key_values": cache}
    model.model.rope_deltas = None  # state that an earlier call has left
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        **options,
    )
    return found[:, ids.shape[1] :]


def seconds_per_token(
    call: Callable[[int], Any], device: torch.device, lengths: tuple[int, int], rounds: int = 3
) -> list[float]:
    """Seconds of one token more, one entry a round.

    Args:
        call: Generates as many tokens as it is told.
        lengths: A short and a long call, warmed up by one short call.
        rounds: Pairs of calls.
    """
    short, long = lengths
    call(short)
    found = []
    for _ in range(rounds):
        times = [wall_seconds(lambda n=n: call(n), device) for n in (short, long)]
        found.append((times[1] - times[0]) / (long - short))
    return found


def assisted_rounds(
    model: PreTrainedModel, draft: PreTrainedModel, ids: Tensor, *, gamma: int, count: int
) -> tuple[list[float], Tensor]:
    """Seconds of every whole round of assisted generation, and the tokens.

    A round is the draft's `gamma` passes, the target's over `gamma + 1` rows, and what follows. The
    host reads the device in each of them, so the target's calls are as far apart as rounds are.

    Args:
        ids: int64 `[1, T]`, the prompt.
        count: Rounds.
    """
    calls: list[tuple[float, int]] = []

    def seen(module: torch.nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        rows = options["inputs_embeds"].shape[1]
        calls.append((time.perf_counter(), rows))

    config = draft.generation_config
    config.num_assistant_tokens = gamma
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0  # or it would stop where it is unsure
    def enough(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((1,), len(calls) >= count + 2, device=ids.device)

    hook = model.model.language_model.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        most = (count + 3) * (gamma + 1)
        criteria = StoppingCriteriaList([enough])
        options = {"assistant_model": draft, "stopping_criteria": criteria}
        tokens = greedy(model, ids, None, most, **options)
    finally:
        hook.remove()
    rounds = [
        following[0] - call[0]
        for call, following in zip(calls, calls[1:])
        if call[1] == following[1] == gamma + 1
    ]
    return rounds, tokens


def wall_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of a call, all of its work on the device included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)
