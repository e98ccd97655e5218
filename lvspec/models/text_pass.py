"""A pass of a text model: over slots behind what a cache holds, or over a prompt.

One decoder loop for all text models, over HF's own weights (`plan.py`) and the operations of
`lvspec.ops`; what it computes is what HF's forward computes. `hf_pass` is that forward itself,
with explicit positions and a `SlotCache`, for models that have no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from lvspec import ops
from lvspec.models.attention import AttentionStep
from lvspec.models.cache import SlotCache
from lvspec.models.hf_names import CACHE
from lvspec.models.plan import DecoderPlan, LayerPlan, as_hf_takes_them

Attend = Callable[[Tensor], Tensor]
"""Attention of turned queries, `[B, Hq, S, D]` both."""

ReadPrompt = Callable[[Tensor, Tensor, SlotCache, int, int], Tensor]
"""What the last layer gets, `[T, H]`; the arguments are those of `prompt_pass` behind the plan."""

_OF_PROMPTS = frozenset({"use_cache", "attention_mask", "cache_position", "return_dict"})
"""What HF hands to a text model that reads a prompt and that is no part of what is computed."""


@dataclass
class StepOutput:
    """What one pass over the slots returns.

    Attributes:
        logits: `[B, S, V]`, the model's dtype.
        masses, peaks: float32 `[L, B, Hq, S]`, one entry for every layer; None without scores. Of a
            model that several processes share `[L, B, 1, S]`, the mean of all heads.
    """

    logits: Tensor
    masses: Tensor | None
    peaks: Tensor | None


def slot_positions(cache: SlotCache, depths: Tensor, shape: torch.Size) -> Tensor:
    """Rotary positions int64 `[R, B, S]` of slots `depths` behind `kv_len`."""
    index = (cache.kv_len[:, None] + depths).long()
    rows = cache.positions.shape[0]
    return cache.positions.gather(2, index.expand(rows, *shape))


def own_pass(
    plan: DecoderPlan, tokens: Tensor, positions: Tensor, cache: SlotCache, step: AttentionStep
) -> Tensor:
    """The text model over slots: `[B, S, H]`, behind the last norm.

    Args:
        plan: Of the model.
        tokens: int64 `[B, S]`.
        positions: int64 `[R, B, S]`.
        cache: Takes the slots' keys and values.
        step: What attention needs, and where it leaves its scores.
    """

    hidden = plan.embed(tokens)
    angles = plan.angles(positions, hidden)
    rows = hidden.flatten(0, 1)
    for index, layer in enumerate(plan.layers):
        own_layer(layer, index, rows, angles, cache, step)
    return plan.norm(rows).view_as(hidden)


def own_layer(
    layer: LayerPlan,
    index: int,
    rows: Tensor,
    angles: tuple[Tensor, Tensor],
    cache: SlotCache,
    step: AttentionStep,
) -> None:
    """One layer of `own_pass`, in place: `rows` `[B * S, H]`, `angles` two of `[B, S, D]`."""

    def attend(query: Tensor) -> Tensor:
        return step.attend(index, query, cache.k[index], cache.v[index], layer.scaling)

    if cache.k_scale is None:
        attended = _attention(layer, index, rows, angles, cache.k, cache.v, cache.kv_len, attend)
    else:
        attended = _attention_in_float8(layer, index, rows, angles, cache, attend)
    layer.out.add_to(rows, attended)
    layer.mlp.add_to(rows, layer.post_norm)


def prompt_pass(
    plan: DecoderPlan,
    embeds: Tensor,
    positions: Tensor,
    cache: SlotCache,
    sequence: int,
    begun: int = 0,
    read: ReadPrompt | None = None,
) -> Tensor:
    """The text model over the prompt of one sequence, into its place: `[1, 1, H]`, the last row.

    Of the last layer only the last row's attention and MLP are computed, which nothing else needs.

    Args:
        plan: Of the model.
        embeds: `[1, T, H]`, video features in their places.
        positions: int64 `[R, 1, T]`.
        cache: Takes its keys and values.
        sequence: The place.
        begun: Rows of the prompt that the place has already; those of `embeds` are behind them.
        read: Runs all layers but the last; None: as operations.
    """
    count, last = embeds.shape[1], len(plan.layers) - 1
    k, v = (x[:, sequence : sequence + 1] for x in (cache.k, cache.v))
    is_float8 = cache.k_scale is not None
    if is_float8:  # a prompt sees its keys and values as they are, a layer at a time
        k, v = (embeds.new_empty((1, *x.shape[1:3], count, x.shape[4])) for x in (k, v))
    start = torch.full((1,), begun, dtype=torch.int32, device=embeds.device)
    sees = None  # which is quicker where it says no more than `is_causal`
    if begun > 0:
        sees = torch.ones(count, begun + count, dtype=torch.bool, device=embeds.device).tril(begun)

    def attend(index: int, scaling: float, query: Tensor) -> Tensor:
        if is_float8:
            cache.write_prompt(index, sequence, k[0, 0], v[0, 0])
        if index == last:
            query = query[:, :, -1:]
        seen = (x[0 if is_float8 else index, :, :, : begun + count] for x in (k, v))
        is_one = query.shape[2] == 1  # which sees all
        mask = {"attn_mask": None if is_one else sees, "is_causal": not is_one and sees is None}
        return scaled_dot_product_attention(query, *seen, **mask, scale=scaling, enable_gqa=True)

    angles = plan.angles(positions, embeds)
    if read is None or last == 0:
        done, rows = 0, embeds[0].clone()
    else:
        done, rows = last, read(embeds, positions, cache, sequence, begun)
    for index in range(done, last + 1):
        layer = plan.layers[index]
        seeing = partial(attend, index, layer.scaling)
        row = 0 if is_float8 else index
        attended = _attention(layer, row, rows, angles, k, v, start, seeing)
        rows = rows[-1:].clone() if index == last else rows
        layer.out.add_to(rows, attended)
        layer.mlp.add_to(rows, layer.post_norm)
    return plan.norm(rows)[None]


def _attention(
    layer: LayerPlan,
    index: int,
    rows: Tensor,
    angles: tuple[Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    kv_len: Tensor,
    attend: Attend,
) -> Tensor:
    """Attention of one layer before its last product, `[R, Hq * D]`; the cache has its rows."""
    shape = angles[0].shape[:2]
    qkv = layer.project(rows).unflatten(0, shape)
    query = ops.rotate_and_write(qkv, *angles, *layer.head_norms, k, v, index, kv_len)
    return attend(query).transpose(1, 2).flatten(2).flatten(0, 1)


def _attention_in_float8(
    layer: LayerPlan,
    index: int,
    rows: Tensor,
    angles: tuple[Tensor, Tensor],
    cache: SlotCache,
    attend: Attend,
) -> Tensor:
    """The same with a float8 cache: keys and values of the slots become bytes on the way there."""
    batch_size, num_slots = angles[0].shape[:2]
    shape = (1, batch_size, cache.k.shape[2], num_slots, cache.k.shape[4])
    k, v = rows.new_empty((2, *shape)).unbind()

    def attend_behind(query: Tensor) -> Tensor:
        cache.write(index, k[0], v[0])
        return attend(query)

    return _attention(layer, 0, rows, angles, k, v, cache.no_rows, attend_behind)


def hf_pass(
    text: nn.Module, tokens: Tensor, positions: Tensor, cache: Cache, step: AttentionStep
) -> Tensor:
    """`own_pass` by HF's own forward.

    Args:
        text: Set to lvspec's attention.
        cache: Takes the slots' keys and values, and returns those of the whole sequence.
    """
    return text(
        input_ids=tokens,
        position_ids=as_hf_takes_them(positions),
        attention_mask=_no_mask(tokens.device),
        use_cache=True,
        lvspec_step=step,
        **{CACHE: cache},
    ).last_hidden_state


@contextmanager
def prompts_read_by(
    plan: DecoderPlan,
    cache: SlotCache,
    sequence: int,
    begun: int = 0,
    read: ReadPrompt | None = None,
) -> Iterator[None]:
    """A context in which HF's forward of the whole model has its prompt read by `prompt_pass`.

    The text model is called with embeddings, features in their places: that is the boundary. What
    else it is handed, such as features for some layers, only its own forward knows.
    """
    text = plan.text
    theirs = text.forward

    def forward(
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **given: Any,
    ) -> BaseModelOutputWithPast:
        own = {*_OF_PROMPTS, CACHE}
        others = [name for name, value in given.items() if value is not None and name not in own]
        if others or position_ids is None:
            return theirs(
                input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, **given
            )
        embeds = plan.embed(input_ids) if inputs_embeds is None else inputs_embeds
        positions = position_ids[None] if position_ids.dim() == 2 else position_ids
        last = prompt_pass(plan, embeds, positions, cache, sequence, begun, read)
        return BaseModelOutputWithPast(last_hidden_state=last)

    vars(text)["forward"] = forward
    try:
        yield
    finally:
        del vars(text)["forward"]


@cache
def _no_mask(device: torch.device) -> Tensor:
    """HF's text models take a mask of four dimensions for a finished one and build none.

    What a slot sees is in the `AttentionStep`; this is never read.
    """
    with torch.inference_mode(False):
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
