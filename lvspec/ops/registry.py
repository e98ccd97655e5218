"""Schemas, shape functions and reference implementations of `torch.ops.lvspec.*`.

Everything is registered for CompositeExplicitAutograd, which every device falls back to: a backend
registered for CPU or CUDA takes precedence there and the schemas stay as they are. Arguments are
flat (tensors and numbers), which is what a Triton or C++ implementation takes; `lvspec.ops` makes
them from plans and policies and checks them. A `workspace` is scratch that the reference does
without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvspec import reference
from lvspec.ops import append, model_parts, scaled_linear, triton_backend
from lvspec.ops.backends import REQUESTED
from lvspec.policy import Rule
from lvspec.reference.accept import accept_by_rule

_Tensors = tuple[Tensor, ...]

# Kept for the life of the process: the registrations go when it is collected.
library = torch.library.Library("lvspec", "DEF")

SCHEMAS = {
    "verify_attention": (
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_len, Tensor ancestors, "
        "Tensor visual, float scale, Tensor? block_table, Tensor? plan_start, Tensor? plan_end, "
        "Tensor? plan_kind, Tensor? k_scale, Tensor? v_scale, bool scores, "
        "Tensor(w!)? workspace) -> "
        "(Tensor out, Tensor lse, Tensor visual_mass, Tensor visual_peak)"
    ),
    "logit_stats": (
        "(Tensor logits, int top_k, Tensor(w!)? workspace) -> "
        "(Tensor top_ids, Tensor top_logits, Tensor lse, Tensor entropy)"
    ),
    "accept": (
        "(Tensor logits, Tensor tokens, Tensor parents, Tensor num_slots, Tensor top_ids, "
        "Tensor top_logits, Tensor lse, Tensor entropy, Tensor? relevance, Tensor? regret_used, "
        "Tensor strict_ids, Tensor eos_ids, float anchor_threshold, float max_regret, int top_k, "
        "float min_log_prob, float typical_log_eps, float typical_log_delta, float min_entropy, "
        "int entropy_top, int shift_window, int window, int max_run, float regret_budget) -> "
        "(Tensor path, Tensor num_accepted, Tensor bonus_id, Tensor kind, Tensor regret)"
    ),
    "accept_sampled": (
        "(Tensor logits, Tensor? draft_logits, Tensor tokens, Tensor num_slots, Tensor uniforms, "
        "float temperature, Tensor(w!)? workspace) -> "
        "(Tensor path, Tensor num_accepted, Tensor bonus_id, Tensor kind, Tensor regret)"
    ),
    "commit_kv": (
        "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor kv_len, Tensor path, "
        "Tensor num_accepted) -> ()"
    ),
    "visual_importance": (
        "(Tensor q, Tensor k_cache, Tensor kv_len, Tensor visual, Tensor lse, float scale) -> "
        "Tensor importance"
    ),
    "expand_tree": (
        "(Tensor logits, Tensor log_probs, Tensor slots, int width, int top_k, "
        "Tensor(w!)? workspace) -> "
        "(Tensor tokens, Tensor parents, Tensor log_probs)"
    ),
}


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float type of sums and statistics: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _verify_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_len: Tensor,
    ancestors: Tensor,
    visual: Tensor,
    scale: float,
    block_table: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    kind: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scores: bool,
    workspace: Tensor | None,
) -> _Tensors:
    plan = None if start is None else reference.SplitPlan(start, end, kind)
    out, lse, mass, peak = reference.verify_attention(
        q,
        k_cache,
        v_cache,
        kv_len,
        ancestors,
        visual,
        scale=scale,
        block_table=block_table,
        plan=plan,
        k_scale=k_scale,
        v_scale=v_scale,
        scores=scores,
    )
    return (out, lse, mass, peak) if scores else (out, lse, lse.new_empty(0), lse.new_empty(0))


def _verify_attention_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_len: Tensor,
    ancestors: Tensor,
    visual: Tensor,
    scale: float,
    block_table: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    kind: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scores: bool,
    workspace: Tensor | None,
) -> _Tensors:
    shape, dtype = q.shape[:3], statistics_dtype(q.dtype)
    score_shape = shape if scores else (0,)
    return (
        q.new_empty(q.shape),
        q.new_empty(shape, dtype=dtype),
        q.new_empty(score_shape, dtype=dtype),
        q.new_empty(score_shape, dtype=dtype),
    )


def _logit_stats(logits: Tensor, top_k: int, workspace: Tensor | None) -> _Tensors:
    return tuple(reference.logit_stats(logits, top_k=top_k))


def _logit_stats_fake(logits: Tensor, top_k: int, workspace: Tensor | None) -> _Tensors:
    rows, dtype = logits.shape[:2], statistics_dtype(logits.dtype)
    return (
        logits.new_empty((*rows, top_k), dtype=torch.int32),
        logits.new_empty((*rows, top_k), dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
    )


def _accept(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    num_slots: Tensor,
    top_ids: Tensor,
    top_logits: Tensor,
    lse: Tensor,
    entropy: Tensor,
    relevance: Tensor | None,
    regret_used: Tensor | None,
    strict_ids: Tensor,
    eos_ids: Tensor,
    *numbers: float,
) -> _Tensors:
    return tuple(
        accept_by_rule(
            logits,
            tokens,
            parents,
            num_slots,
            reference.LogitStats(top_ids, top_logits, lse, entropy),
            relevance,
            Rule(*numbers),
            strict_ids=strict_ids.tolist(),
            eos_ids=eos_ids.tolist(),
            regret_used=regret_used,
        )
    )


def _accept_fake(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    num_slots: Tensor,
    top_ids: Tensor,
    top_logits: Tensor,
    lse: Tensor,
    *others: Any,
) -> _Tensors:
    batch_size = tokens.shape[0]
    return (
        tokens.new_empty(tokens.shape, dtype=torch.int32),
        tokens.new_empty(batch_size, dtype=torch.int32),
        tokens.new_empty(batch_size, dtype=torch.int64),
        tokens.new_empty(tokens.shape, dtype=torch.uint8),
        lse.new_empty(batch_size),
    )


def _accept_sampled(
    logits: Tensor,
    draft_logits: Tensor | None,
    tokens: Tensor,
    num_slots: Tensor,
    uniforms: Tensor,
    temperature: float,
    workspace: Tensor | None,
) -> _Tensors:
    return tuple(
        reference.accept_sampled(
            logits, draft_logits, tokens, num_slots, uniforms, temperature=temperature
        )
    )


def _accept_sampled_fake(
    logits: Tensor,
    draft_logits: Tensor | None,
    tokens: Tensor,
    num_slots: Tensor,
    uniforms: Tensor,
    temperature: float,
    workspace: Tensor | None,
) -> _Tensors:
    batch_size = tokens.shape[0]
    return (
        tokens.new_empty(tokens.shape, dtype=torch.int32),
        tokens.new_empty(batch_size, dtype=torch.int32),
        tokens.new_empty(batch_size, dtype=torch.int64),
        tokens.new_empty(tokens.shape, dtype=torch.uint8),
        logits.new_empty(batch_size, dtype=statistics_dtype(logits.dtype)),
    )


def _commit_kv_fake(
    k_cache: Tensor, v_cache: Tensor, kv_len: Tensor, path: Tensor, num_accepted: Tensor
) -> None:
    return None


def _visual_importance(
    q: Tensor, k_cache: Tensor, kv_len: Tensor, visual: Tensor, lse: Tensor, scale: float
) -> Tensor:
    return reference.visual_importance(q, k_cache, kv_len, visual, lse, scale=scale)


def _visual_importance_fake(
    q: Tensor, k_cache: Tensor, kv_len: Tensor, visual: Tensor, lse: Tensor, scale: float
) -> Tensor:
    return q.new_empty(visual.shape, dtype=statistics_dtype(q.dtype))


def _expand_tree(
    logits: Tensor,
    log_probs: Tensor,
    slots: Tensor,
    width: int,
    top_k: int,
    workspace: Tensor | None,
) -> _Tensors:
    return tuple(reference.expand_tree(logits, log_probs, slots, width=width, top_k=top_k))


def _expand_tree_fake(
    logits: Tensor,
    log_probs: Tensor,
    slots: Tensor,
    width: int,
    top_k: int,
    workspace: Tensor | None,
) -> _Tensors:
    shape = (logits.shape[0], width)
    return (
        slots.new_empty(shape, dtype=torch.int64),
        slots.new_empty(shape),
        log_probs.new_empty(shape),
    )


def _register() -> None:
    implementations = {
        "verify_attention": (_verify_attention, _verify_attention_fake),
        "logit_stats": (_logit_stats, _logit_stats_fake),
        "accept": (_accept, _accept_fake),
        "accept_sampled": (_accept_sampled, _accept_sampled_fake),
        "commit_kv": (reference.commit_kv, _commit_kv_fake),
        "visual_importance": (_visual_importance, _visual_importance_fake),
        "expand_tree": (_expand_tree, _expand_tree_fake),
    }
    for name, (implementation, fake) in implementations.items():
        library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lvspec::{name}", fake, lib=library)
    append.register(library)
    model_parts.register(library)
    scaled_linear.register(library)
    if REQUESTED in (None, "triton"):
        triton_backend.register(library, "CUDA")
    if REQUESTED == "triton":
        triton_backend.register(library, "CPU")
    if REQUESTED == "cpp":
        triton_backend.refuse(library, "CUDA")


_register()
