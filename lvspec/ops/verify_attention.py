"""The operations of lvspec, checked and dispatched to a backend.

Each function checks what it is given (attributes only: nothing is read from a device), calls
`torch.ops.lvspec.<its name>` and returns a NamedTuple. Meaning, shapes and types are those of the
function of the same name in `lvspec.reference`, whose documentation is not repeated here. All raise
ValueError that names the argument, what was expected and what came, and none needs a gradient.

LVSPEC_BACKEND in the environment, read when this module is imported, forces a backend; see
`backends`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import torch

from lvspec.kernels.workspace import (
    accept_sampled_bytes,
    expand_tree_bytes,
    logit_stats_bytes,
    num_masked_pieces,
    verify_attention_bytes,
)
from lvspec.ops import registry
from lvspec.ops.backends import Backend, active_backend, backends, float_dtypes, requested_backend
from lvspec.ops.workspace import workspace_size
from lvspec.policy import MAX_TOP_K, AcceptancePolicy
from lvspec.reference import (
    Acceptance,
    LogitStats,
    SplitPlan,
    TreeLevel,
    VerifyAttention,
    piece_length,
    plan_splits,
)
from lvspec.tree import MAX_SLOTS

__all__ = [
    "Acceptance",
    "Backend",
    "LogitStats",
    "SplitPlan",
    "TreeLevel",
    "VerifyAttention",
    "accept",
    "accept_sampled",
    "active_backend",
    "backends",
    "commit_kv",
    "expand_tree",
    "float_dtypes",
    "logit_stats",
    "piece_length",
    "plan_splits",
    "requested_backend",
    "verify_attention",
    "visual_importance",
    "workspace_size",
]

MAX_HEAD_DIM = 256
"""The largest head dimension that kernels take; the reference takes any."""

_STATISTICS = (torch.float32, torch.float64)
_FP8 = torch.float8_e4m3fn
_INT32 = (torch.int32,)
_INT64 = (torch.int64,)
_UINT8 = (torch.uint8,)


def verify_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    visual: torch.Tensor,
    *,
    scale: float | None = None,
    block_table: torch.Tensor | None = None,
    plan: SplitPlan | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    scores: bool = True,
    workspace: torch.Tensor | None = None,
) -> VerifyAttention:
    """Attention of the draft slots over cache and tree: `lvspec.reference.verify_attention`."""
    # One by one, the checks take longer than attention over a short cache: most calls skip them.
    if (
        plan is not None
        or block_table is not None
        or k_scale is not None
        or v_scale is not None
        or workspace is not None
        or not _fit_without_options(q, k_cache, v_cache, kv_len, ancestors, visual)
    ):
        _check_attention(
            q,
            k_cache,
            v_cache,
            kv_len,
            ancestors,
            visual,
            block_table=block_table,
            plan=plan,
            k_scale=k_scale,
            v_scale=v_scale,
            workspace=workspace,
        )
    start, end, kind = (None, None, None) if plan is None else plan
    out, lse, mass, peak = torch.ops.lvspec.verify_attention(
        q,
        k_cache,
        v_cache,
        kv_len,
        ancestors,
        visual,
        q.shape[3] ** -0.5 if scale is None else scale,
        block_table,
        start,
        end,
        kind,
        k_scale,
        v_scale,
        scores,
        workspace,
    )
    return (
        VerifyAttention(out, lse, mass, peak) if scores else VerifyAttention(out, lse, None, None)
    )


def logit_stats(
    logits: torch.Tensor, *, top_k: int = 4, workspace: torch.Tensor | None = None
) -> LogitStats:
    """Best tokens, log-sum-exp and entropy of every row: `lvspec.reference.logit_stats`."""
    if logits.dim() != 3:
        _fail("logits", "shape [B, S, V]", tuple(logits.shape))
    _check_float("logits", logits)
    _check_top_k(top_k, logits.shape[2])
    rows = logits.shape[0] * logits.shape[1]
    _check_workspace(workspace, logits.device, logit_stats_bytes(rows, logits.shape[2], top_k))
    return LogitStats(*torch.ops.lvspec.logit_stats(logits, top_k, workspace))


def accept(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_slots: torch.Tensor,
    stats: LogitStats,
    relevance: torch.Tensor | None,
    policy: AcceptancePolicy,
    *,
    regret_used: torch.Tensor | None = None,
) -> Acceptance:
    """Which draft tokens stand under `policy`: `lvspec.reference.accept`."""
    if logits.dim() != 3:
        _fail("logits", "shape [B, S, V]", tuple(logits.shape))
    _check_float("logits", logits)
    device = logits.device
    shape = logits.shape[:2]
    batch_size, slots = shape
    if not 1 <= slots <= MAX_SLOTS:
        _fail("logits", f"1 to {MAX_SLOTS} slots S", slots)
    _check("tokens", tokens, _INT64, shape, device)
    _check("parents", parents, _INT32, shape, device)
    _check("num_slots", num_slots, _INT32, (batch_size,), device)
    top_ids, top_logits, lse, entropy = stats
    if top_ids.dim() != 3:
        _fail("stats.top_ids", "shape [B, S, K]", tuple(top_ids.shape))
    kept = top_ids.shape[2]
    statistics = (registry.statistics_dtype(logits.dtype),)
    _check("stats.top_ids", top_ids, _INT32, (*shape, kept), device)
    _check("stats.top_logits", top_logits, statistics, (*shape, kept), device)
    _check("stats.lse", lse, statistics, shape, device)
    _check("stats.entropy", entropy, statistics, shape, device)
    if policy.needed_top_k > kept:
        _fail(
            "stats", f"the {policy.needed_top_k} best tokens per row, which the policy needs", kept
        )
    if relevance is not None:
        _check("relevance", relevance, _STATISTICS, shape, device)
    elif policy.needs_relevance:
        _fail("relevance", "a tensor, for the policy has a finite anchor_threshold", None)
    if regret_used is not None:
        _check("regret_used", regret_used, _STATISTICS, (batch_size,), device)
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


def accept_sampled(
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    num_slots: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    temperature: float = 1.0,
    workspace: torch.Tensor | None = None,
) -> Acceptance:
    """Which draft tokens stand where the target samples: `lvspec.reference.accept_sampled`."""
    if logits.dim() != 3:
        _fail("logits", "shape [B, S, V]", tuple(logits.shape))
    _check_float("logits", logits)
    device = logits.device
    batch_size, slots, vocabulary = logits.shape
    if not 1 <= slots <= MAX_SLOTS:
        _fail("logits", f"1 to {MAX_SLOTS} slots S", slots)
    if vocabulary < 1:
        _fail("logits", "a vocabulary V of at least 1", vocabulary)
    draft_vocabulary = 0
    if draft_logits is not None:
        if draft_logits.dim() != 3:
            _fail("draft_logits", "shape [B, S - 1, Vd]", tuple(draft_logits.shape))
        draft_vocabulary = draft_logits.shape[2]
        shape = (batch_size, slots - 1, draft_vocabulary)
        _check("draft_logits", draft_logits, float_dtypes(device.type), shape, device)
        if draft_vocabulary < 1:
            _fail("draft_logits", "a vocabulary Vd of at least 1", draft_vocabulary)
    _check("tokens", tokens, _INT64, (batch_size, slots), device)
    _check("num_slots", num_slots, _INT32, (batch_size,), device)
    _check("uniforms", uniforms, (torch.float32,), (batch_size, slots), device)
    if not 0 < temperature < math.inf:
        _fail("temperature", "a finite number > 0", temperature)
    needed = accept_sampled_bytes(batch_size, slots, vocabulary, draft_vocabulary)
    _check_workspace(workspace, device, needed)
    operation = torch.ops.lvspec.accept_sampled
    return Acceptance(
        *operation(logits, draft_logits, tokens, num_slots, uniforms, temperature, workspace)
    )


def commit_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    path: torch.Tensor,
    num_accepted: torch.Tensor,
) -> None:
    """Move the K/V of accepted slots into place, in place: `lvspec.reference.commit_kv`."""
    if k_cache.dim() not in (4, 5):
        _fail("k_cache", "shape [L, B, Hkv, N, D] or [B, Hkv, N, D]", tuple(k_cache.shape))
    if path.dim() != 2:
        _fail("path", "shape [B, S]", tuple(path.shape))
    device = k_cache.device
    batch_size, slots = k_cache.shape[-4], path.shape[1]
    _check("v_cache", v_cache, (k_cache.dtype,), k_cache.shape, device)
    _check("kv_len", kv_len, _INT32, (batch_size,), device)
    _check("path", path, _INT32, (batch_size, slots), device)
    _check("num_accepted", num_accepted, _INT32, (batch_size,), device)
    if not 1 <= slots <= MAX_SLOTS:
        _fail("path", f"1 to {MAX_SLOTS} slots S", slots)
    if k_cache.shape[-2] < slots:
        _fail("k_cache", f"a capacity N of at least S = {slots}", k_cache.shape[-2])
    torch.ops.lvspec.commit_kv(k_cache, v_cache, kv_len, path, num_accepted)


def visual_importance(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    kv_len: torch.Tensor,
    visual: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention that each video position receives: `lvspec.reference.visual_importance`."""
    if q.dim() != 4:
        _fail("q", "shape [B, Hq, R, D]", tuple(q.shape))
    if k_cache.dim() != 4:
        _fail("k_cache", "shape [B, Hkv, N, D]", tuple(k_cache.shape))
    _check_float("q", q)
    device = q.device
    batch_size, num_q_heads, _, head_dim = q.shape
    num_kv_heads, capacity = k_cache.shape[1:3]
    _check("k_cache", k_cache, (q.dtype,), (batch_size, num_kv_heads, capacity, head_dim), device)
    _check_heads(num_q_heads, num_kv_heads)
    _check("kv_len", kv_len, _INT32, (batch_size,), device)
    _check("visual", visual, _UINT8, (batch_size, capacity), device)
    _check("lse", lse, (registry.statistics_dtype(q.dtype),), q.shape[:3], device)
    factor = head_dim**-0.5 if scale is None else scale
    return torch.ops.lvspec.visual_importance(q, k_cache, kv_len, visual, lse, factor)


def expand_tree(
    logits: torch.Tensor,
    log_probs: torch.Tensor,
    slots: torch.Tensor,
    *,
    width: int,
    top_k: int | None = None,
    workspace: torch.Tensor | None = None,
) -> TreeLevel:
    """The next level of a draft tree: `lvspec.reference.expand_tree`."""
    if logits.dim() != 3:
        _fail("logits", "shape [B, W, V]", tuple(logits.shape))
    _check_float("logits", logits)
    nodes, vocabulary = logits.shape[1:]
    if top_k is None:
        top_k = min(width, vocabulary, MAX_TOP_K)
    _check_top_k(top_k, vocabulary)
    if not 1 <= width <= nodes * top_k:
        _fail("width", f"1 to W * top_k = {nodes * top_k} nodes", width)
    statistics = (registry.statistics_dtype(logits.dtype),)
    _check("log_probs", log_probs, statistics, logits.shape[:2], logits.device)
    _check("slots", slots, _INT32, logits.shape[:2], logits.device)
    rows = logits.shape[0] * nodes
    _check_workspace(workspace, logits.device, expand_tree_bytes(rows, vocabulary, top_k))
    operation = torch.ops.lvspec.expand_tree
    return TreeLevel(*operation(logits, log_probs, slots, width, top_k, workspace))


def _fail(argument: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def _check(
    argument: str,
    tensor: torch.Tensor,
    dtypes: Collection[torch.dtype],
    shape: Sequence[int],
    device: torch.device,
) -> None:
    if tensor.dtype not in dtypes:
        _fail(argument, f"dtype {_names(dtypes)}", tensor.dtype)
    if tensor.shape != shape:
        _fail(argument, f"shape {tuple(shape)}", tuple(tensor.shape))
    if tensor.device != device:
        _fail(argument, f"device {device}", tensor.device)


def _fit_without_options(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    visual: torch.Tensor,
) -> bool:
    """Whether the tensors of a plain verify_attention fit; if not, `_check_attention` says why."""
    shape, stored, dtype, device = q.shape, k_cache.shape, q.dtype, q.device
    if len(shape) != 4 or len(stored) != 4:
        return False
    batch_size, num_q_heads, num_slots, head_dim = shape
    stored_batch, num_kv_heads, capacity, stored_dim = stored
    return (
        stored_batch == batch_size >= 1
        and stored_dim == head_dim
        and 1 <= num_slots <= MAX_SLOTS
        and num_slots <= capacity
        and num_kv_heads >= 1
        and num_q_heads % num_kv_heads == 0
        and 1 <= head_dim <= MAX_HEAD_DIM
        and v_cache.shape == stored
        and kv_len.shape == (batch_size,)
        and ancestors.shape == (batch_size, num_slots)
        and visual.shape == (batch_size, capacity)
        and k_cache.dtype is dtype
        and v_cache.dtype is dtype
        and kv_len.dtype is torch.int32
        and ancestors.dtype is torch.int64
        and visual.dtype is torch.uint8
        and k_cache.device == device
        and v_cache.device == device
        and kv_len.device == device
        and ancestors.device == device
        and visual.device == device
        and dtype in float_dtypes(device.type)
    )


def _check_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_len: torch.Tensor,
    ancestors: torch.Tensor,
    visual: torch.Tensor,
    *,
    block_table: torch.Tensor | None,
    plan: SplitPlan | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> None:
    """Raise ValueError for the first argument of verify_attention that does not fit."""
    if q.dim() != 4:
        _fail("q", "shape [B, Hq, S, D]", tuple(q.shape))
    if k_cache.dim() != 4:
        _fail("k_cache", "4 dimensions", tuple(k_cache.shape))
    device = q.device
    batch_size, num_q_heads, num_slots, head_dim = q.shape
    num_kv_heads, capacity = k_cache.shape[1:3]
    stored = (q.dtype, _FP8)
    _check_float("q", q)
    _check_head_dim(head_dim, device)
    if batch_size < 1:
        _fail("q", "at least one sequence", batch_size)
    if not 1 <= num_slots <= MAX_SLOTS:
        _fail("q", f"1 to {MAX_SLOTS} slots S", num_slots)
    if block_table is None:
        _check("k_cache", k_cache, stored, (batch_size, num_kv_heads, capacity, head_dim), device)
    else:
        if block_table.dim() != 2:
            _fail("block_table", "shape [B, max_pages]", tuple(block_table.shape))
        _check("block_table", block_table, _INT32, (batch_size, block_table.shape[1]), device)
        _check("k_cache", k_cache, stored, (*k_cache.shape[:3], head_dim), device)
        capacity *= block_table.shape[1]
    _check("v_cache", v_cache, (k_cache.dtype,), k_cache.shape, device)
    _check_heads(num_q_heads, num_kv_heads)
    for name, factor in (("k_scale", k_scale), ("v_scale", v_scale)):
        if factor is not None:
            _check(name, factor, (torch.float32,), (num_kv_heads,), device)
        elif k_cache.dtype == _FP8:
            _fail(name, f"a factor per KV head, for the cache is {_names((_FP8,))}", None)
    _check_float8(k_cache)
    if capacity < num_slots:
        _fail("k_cache", f"a capacity N of at least S = {num_slots}", capacity)
    _check("kv_len", kv_len, _INT32, (batch_size,), device)
    _check("ancestors", ancestors, _INT64, (batch_size, num_slots), device)
    _check("visual", visual, _UINT8, (batch_size, capacity), device)
    if plan is not None:
        if plan[0].dim() != 2:
            _fail("plan.start", "shape [B, P]", tuple(plan[0].shape))
        for name, table in zip(SplitPlan._fields, plan):
            _check(f"plan.{name}", table, _INT32, (batch_size, plan[0].shape[1]), device)
    pieces = num_masked_pieces(capacity) if plan is None else plan[0].shape[1]
    needed = verify_attention_bytes(batch_size, num_q_heads, num_slots, head_dim, pieces)
    _check_workspace(workspace, device, needed)


def _check_float(argument: str, tensor: torch.Tensor) -> None:
    """The types that the backend of the tensor's device takes."""
    dtypes = float_dtypes(tensor.device.type)
    if tensor.dtype not in dtypes:
        _fail(argument, f"dtype {_names(dtypes)}", tensor.dtype)


def _check_float8(cache: torch.Tensor) -> None:
    if cache.dtype == _FP8 and cache.is_cuda:
        capability = torch.cuda.get_device_capability(cache.device)
        if capability < (8, 9):
            got = f"{capability[0]}.{capability[1]}"
            _fail("k_cache", "compute capability 8.9 or more for float8_e4m3fn", got)


def _check_workspace(workspace: torch.Tensor | None, device: torch.device, size: int) -> None:
    if workspace is None:
        return
    if workspace.dtype != torch.uint8 or workspace.dim() != 1 or not workspace.is_contiguous():
        got = f"{workspace.dtype} {tuple(workspace.shape)}"
        _fail("workspace", "contiguous uint8 of one dimension", got)
    if workspace.device != device:
        _fail("workspace", f"device {device}", workspace.device)
    if workspace.shape[0] < size:
        _fail("workspace", f"at least {size} bytes (see workspace_size)", workspace.shape[0])


def _check_head_dim(head_dim: int, device: torch.device) -> None:
    most = None if active_backend(device.type) == "reference" else MAX_HEAD_DIM
    if most is not None and not 1 <= head_dim <= most:
        _fail("q", f"a head dimension D from 1 to {most}", head_dim)


def _check_heads(num_q_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        _fail("q", f"a multiple of Hkv = {num_kv_heads} heads", num_q_heads)


def _check_top_k(top_k: int, vocabulary: int) -> None:
    most = min(MAX_TOP_K, vocabulary)
    if not 1 <= top_k <= most:
        _fail("top_k", f"1 to {most} for a vocabulary of {vocabulary}", top_k)


def _names(dtypes: Collection[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


_ID_TENSORS: dict[tuple[tuple[int, ...], torch.device], torch.Tensor] = {}


def _id_tensor(ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The ids on the device: made once, so that calls create no tensor and addresses stay."""
    key = (ids, device)
    if key not in _ID_TENSORS:
        _ID_TENSORS[key] = torch.tensor(ids, dtype=torch.int64, device=device)
    return _ID_TENSORS[key]
