"""Whether a plan computes what HF's own layers compute, on random numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lvspec.models.attention import AttentionStep, lvspec_attention_on
from lvspec.models.cache import SlotCache, head_dim_of
from lvspec.models.hf_names import CACHE
from lvspec.models.plan import DecoderPlan
from lvspec.models.ranks import parts_of_heads, ranks_of
from lvspec.models.text_pass import own_layer, slot_positions
from lvspec.tree import chain_ancestors

_SLOTS, _ROOM = 3, 8

RunLayer = Callable[[int, Tensor, SlotCache, AttentionStep], Tensor]
"""What layer `index` makes of hidden states `[B, S, H]`."""


def first_difference(plan: DecoderPlan, run_layer: RunLayer | None = None) -> str | None:
    """The first part that disagrees with HF's, in words; None: all agree.

    Args:
        plan: Of the text model.
        run_layer: What is compared; None: the layers of the plan.
    """
    text, ranks = plan.text, ranks_of(plan.text)
    eps = max(torch.finfo(text.embed_tokens.weight.dtype).eps, 2e-6)
    hidden = _random(2, _SLOTS, text.config.hidden_size, like=text.embed_tokens.weight)
    cache = _small_cache(plan)
    depths = torch.arange(_SLOTS, device=hidden.device)
    positions = slot_positions(cache, depths, hidden.shape[:2])
    with lvspec_attention_on(text):
        for index, layer in enumerate(text.layers):
            theirs = _run(_hf_layer(plan, layer, positions), index, hidden, cache)
            ours = _run(run_layer or _own_layer(plan, positions), index, hidden, cache)
            if not ranks.all(_agree(ours, theirs, eps)):
                return f"layer {index} ({type(layer).__name__})"
    is_last = _agree((plan.norm(hidden),), (text.norm(hidden),), eps)
    if run_layer is None and not ranks.all(is_last):
        return f"the last norm ({type(text.norm).__name__})"
    return None


def _own_layer(plan: DecoderPlan, positions: Tensor) -> RunLayer:
    def run(index: int, hidden: Tensor, cache: SlotCache, step: AttentionStep) -> Tensor:
        rows = hidden.flatten(0, 1).clone()
        own_layer(plan.layers[index], index, rows, plan.angles(positions, hidden), cache, step)
        return rows.view_as(hidden)

    return run


def _hf_layer(plan: DecoderPlan, layer: torch.nn.Module, positions: Tensor) -> RunLayer:
    def run(index: int, hidden: Tensor, cache: SlotCache, step: AttentionStep) -> Tensor:
        angles = plan.angles.of_module(positions, hidden)
        given = {"attention_mask": None, "position_embeddings": angles, CACHE: cache}
        result = layer(hidden, lvspec_step=step, **given)
        return result[0] if isinstance(result, tuple) else result

    return run


def _run(
    run_layer: RunLayer, index: int, hidden: Tensor, cache: SlotCache
) -> tuple[Tensor, ...]:
    """Its result, what it wrote into the cache, and its scores."""
    fresh = SlotCache.over(cache.k.clone(), cache.v.clone(), *cache.tensors()[2:])
    fresh.begin_step(_SLOTS)
    ancestors = chain_ancestors(_SLOTS, batch_size=2, device=hidden.device)
    step = AttentionStep(fresh.kv_len, ancestors, fresh.visual, True)
    result = run_layer(index, hidden, fresh, step)
    return result, fresh.k[index], fresh.v[index], *step.masses, *step.peaks


def _small_cache(plan: DecoderPlan) -> SlotCache:
    """Two sequences of random keys and values."""
    config, like = plan.text.config, plan.text.embed_tokens.weight
    _, kv_heads = parts_of_heads(plan.text)
    shape = (len(plan.layers), 2, kv_heads, _ROOM, head_dim_of(config))
    kv_len = torch.tensor([0, 4], dtype=torch.int32, device=like.device)
    visual = (torch.arange(_ROOM, device=like.device) % 2).to(torch.uint8).repeat(2, 1)
    rows = plan.angles.num_rows
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(50, (rows, 2, _ROOM), generator=generator).to(like.device)
    k, v = (_random(*shape, like=like, seed=seed) for seed in (2, 3))
    return SlotCache.over(k, v, kv_len, visual, positions)


def _random(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)


def _agree(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], eps: float) -> bool:
    """Up to a few roundings of the largest number of a row, and less on average.

    Scores are float32 where rows are not, which were rounded before.
    """
    return len(ours) == len(theirs) and all(
        x.shape == y.shape and x.dtype == y.dtype and _is_close(x, y, eps)
        for x, y in zip(ours, theirs, strict=True)
    )


def _is_close(x: Tensor, y: Tensor, eps: float) -> bool:
    error, size = (x.float() - y.float()).abs(), y.float().abs()
    if not bool((error.amax(-1) <= 8 * eps * size.amax(-1).clamp(min=eps)).all()):
        return False
    return bool(error.mean() <= eps * size.mean().clamp(min=eps))
