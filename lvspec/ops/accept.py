"""accept: which draft tokens stand under a policy."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec.ops.checks import INT32, INT64, STATISTICS, check, check_float, fail, statistics_dtype
from lvspec.ops.registry import define
from lvspec.policy import AcceptancePolicy, Rule
from lvspec.reference import Acceptance, LogitStats
from lvspec.reference.accept import accept_by_rule
from lvspec.tree import MAX_SLOTS

_ID_TENSORS: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def accept(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    num_slots: Tensor,
    stats: LogitStats,
    relevance: Tensor | None,
    policy: AcceptancePolicy,
    *,
    regret_used: Tensor | None = None,
) -> Acceptance:
    """Which draft tokens stand under `policy`: `lvspec.reference.accept`."""
    if logits.dim() != 3:
        fail("logits", "shape [B, S, V]", tuple(logits.shape))
    check_float("logits", logits)
    device = logits.device
    shape = logits.shape[:2]
    batch_size, slots = shape
    if not 1 <= slots <= MAX_SLOTS:
        fail("logits", f"1 to {MAX_SLOTS} slots S", slots)
    check("tokens", tokens, INT64, shape, device)
    check("parents", parents, INT32, shape, device)
    check("num_slots", num_slots, INT32, (batch_size,), device)
    top_ids, top_logits, lse, entropy = stats
    if top_ids.dim() != 3:
        fail("stats.top_ids", "shape [B, S, K]", tuple(top_ids.shape))
    kept = top_ids.shape[2]
    statistics = (statistics_dtype(logits.dtype),)
    check("stats.top_ids", top_ids, INT32, (*shape, kept), device)
    check("stats.top_logits", top_logits, statistics, (*shape, kept), device)
    check("stats.lse", lse, statistics, shape, device)
    check("stats.entropy", entropy, statistics, shape, device)
    if policy.needed_top_k > kept:
        fail(
            "stats", f"the {policy.needed_top_k} best tokens per row, which the policy needs", kept
        )
    if relevance is not None:
        check("relevance", relevance, STATISTICS, shape, device)
    elif policy.needs_relevance:
        fail("relevance", "a tensor, for the policy has a finite anchor_threshold", None)
    if regret_used is not None:
        check("regret_used", regret_used, STATISTICS, (batch_size,), device)
    return Acceptance(
        *torch.ops.lvspec.accept(
            logits,
            tokens,
            parents,
            num_slots,
            top_ids,
            top_logits,
            lse,
            entropy,
            relevance,
            regret_used,
            _id_tensor(policy.strict_ids, device),
            _id_tensor(policy.eos_ids, device),
            *policy.rule,
        )
    )


def _id_tensor(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """The ids on the device: made once, so that calls create no tensor and addresses stay."""
    key = (ids, device)
    if key not in _ID_TENSORS:
        _ID_TENSORS[key] = torch.tensor(ids, dtype=torch.int64, device=device)
    return _ID_TENSORS[key]


def _specification(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    num_slots: Tensor,
    stats: LogitStats,
    relevance: Tensor | None,
    regret_used: Tensor | None,
    strict_ids: Tensor,
    eos_ids: Tensor,
    rule: Rule,
) -> Acceptance:
    return accept_by_rule(
        logits,
        tokens,
        parents,
        num_slots,
        stats,
        relevance,
        rule,
        strict_ids=strict_ids.tolist(),
        eos_ids=eos_ids.tolist(),
        regret_used=regret_used,
    )


def acceptance_shapes(tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Empty tensors like the fields of an Acceptance; `dtype` is that of `regret`."""
    batch_size = tokens.shape[0]
    return (
        tokens.new_empty(tokens.shape, dtype=torch.int32),
        tokens.new_empty(batch_size, dtype=torch.int32),
        tokens.new_empty(batch_size, dtype=torch.int64),
        tokens.new_empty(tokens.shape, dtype=torch.uint8),
        tokens.new_empty(batch_size, dtype=dtype),
    )


def _shapes(tokens: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    return acceptance_shapes(tokens, lse.dtype)


define("accept", _specification, _shapes)
