"""accept: which draft tokens stand under a policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lvspec.ops.checks import (
    FLOAT32,
    INT32,
    INT64,
    STATISTICS,
    check,
    check_float,
    fail,
    statistics_dtype,
)
from lvspec.ops.registry import define
from lvspec.policy import AcceptancePolicy
from lvspec.reference import Acceptance, LogitStats
from lvspec.reference.accept import accept_by_rule
from lvspec.rule import Rule
from lvspec.tree import MAX_SLOTS


class Rules(NamedTuple):
    """Policies of the sequences of a batch, as tensors on a device.

    Changed in place they are those of the next call, in a captured graph too.
    """

    numbers: Tensor  # float32 [B, K], in every row the numbers of a `lvspec.rule.Rule`
    strict_ids: Tensor  # int64 [B, E], -1 for none
    eos_ids: Tensor  # int64 [F], of all

    @classmethod
    def of(
        cls,
        policies: Sequence[AcceptancePolicy],
        eos_ids: Iterable[int],
        device: torch.device,
        *,
        num_strict_ids: int | None = None,
    ) -> Rules:
        """The rules of these policies.

        Args:
            policies: One a sequence.
            eos_ids: End-of-sequence ids, of all sequences.
            device: Where.
            num_strict_ids: Columns for `strict_ids`; None: as many as are needed.
        """
        needed = max([0, *[len(policy.strict_ids) for policy in policies]])
        width = needed if num_strict_ids is None else num_strict_ids
        strict = [[*p.strict_ids, *[-1] * (width - len(p.strict_ids))] for p in policies]
        rules = [policy.rule for policy in policies]
        return cls(
            torch.tensor(rules, dtype=torch.float32).view(-1, len(Rule._fields)).to(device),
            torch.tensor(strict, dtype=torch.int64).view(len(policies), width).to(device),
            torch.tensor(list(eos_ids), dtype=torch.int64).to(device),
        )


def accept(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    num_slots: Tensor,
    stats: LogitStats,
    relevance: Tensor | None,
    policy: AcceptancePolicy | Rules,
    *,
    regret_used: Tensor | None = None,
) -> Acceptance:
    """Which draft tokens stand under `policy`: `lvspec.reference.accept`.

    Args:
        policy: One for all sequences, or the `Rules` of each, which are on the device.
        logits, tokens, parents, num_slots, stats, relevance, regret_used: As there.
    """
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
    if isinstance(policy, AcceptancePolicy):
        if policy.needed_top_k > kept:
            needed = f"the {policy.needed_top_k} best tokens per row, which the policy needs"
            fail("stats", needed, kept)
        if relevance is None and policy.needs_relevance:
            fail("relevance", "a tensor, for the policy has a finite anchor_threshold", None)
        policy = _rules_of(policy, batch_size, device)
    check("policy.numbers", policy.numbers, FLOAT32, (batch_size, len(Rule._fields)), device)
    if policy.strict_ids.dim() != 2:
        fail("policy.strict_ids", "shape [B, E]", tuple(policy.strict_ids.shape))
    ids = (batch_size, policy.strict_ids.shape[1])
    check("policy.strict_ids", policy.strict_ids, INT64, ids, device)
    check("policy.eos_ids", policy.eos_ids, INT64, policy.eos_ids.shape[:1], device)
    if relevance is not None:
        check("relevance", relevance, STATISTICS, shape, device)
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
            policy.strict_ids,
            policy.eos_ids,
            policy.numbers,
        )
    )


@lru_cache(maxsize=64)
def _rules_of(policy: AcceptancePolicy, batch_size: int, device: torch.device) -> Rules:
    """Made once, so that calls create no tensor and addresses stay."""
    with torch.inference_mode(False):
        return Rules.of([policy] * batch_size, policy.eos_ids, device)


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


define("accept", accept_by_rule, _shapes)
