"""Random inputs of every operation at a size, and the bytes that it must read and write."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from ops.cases import Case, capacity_of, kv_lengths, parents_of
from ops.reasons import DoesNotFit
from torch import Tensor

from lvspec import ops, reference, tree
from lvspec.policy import AcceptancePolicy
from lvspec.rule import GATE_BINS


def seed(case: Case) -> None:
    """The same inputs for a case whatever ran before it."""
    torch.manual_seed(sum(map(ord, str(case))))


def visual_mask(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """(visual uint8 `[B, N]`, prompt_len `[B]`): system prompt, one long video, question, answer.

    So stand the tokens of one clip in the prompts of these models. The answer so far is at most 128
    tokens, an eighth of a short context.
    """
    visual = torch.zeros(case.batch_size, capacity_of(case), dtype=torch.uint8)
    prompt_len = []
    for marks, length in zip(visual, kv_lengths(case)):
        answer, question = min(128, length // 8), min(40, length // 8)
        prompt_len.append(length - answer)
        marks[min(15, length // 8) : length - answer - question] = 1
    return visual.to(device), torch.tensor(prompt_len)


class VerifyInputs(NamedTuple):
    """Arguments of `ops.verify_attention`."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    kv_len: Tensor
    ancestors: Tensor
    visual: Tensor
    plan: ops.SplitPlan


def verify_inputs(
    case: Case, device: torch.device, dtype: torch.dtype, *, max_piece: int | None = None
) -> VerifyInputs:
    """With the split plan that a prompt of this length gets, or one of other pieces."""
    shape = case.shape
    stored = (case.batch_size, shape.num_kv_heads, capacity_of(case), shape.head_dim)
    _require(2 * _size(stored, dtype), device)
    seed(case)
    q_shape = (case.batch_size, case.num_slots, shape.num_q_heads, shape.head_dim)
    q = torch.randn(q_shape, dtype=dtype, device=device).transpose(1, 2)  # as a model hands it over
    caches = [torch.randn(stored, dtype=dtype, device=device) for _ in range(2)]
    parents = torch.tensor([parents_of(case)] * case.batch_size, dtype=torch.int32, device=device)
    visual, prompt_len = visual_mask(case, device)
    return VerifyInputs(
        q,
        *caches,
        torch.tensor(kv_lengths(case), dtype=torch.int32, device=device),
        tree.ancestors_from_parents(parents),
        visual,
        ops.plan_splits(visual, prompt_len, max_piece=max_piece, num_kv_heads=shape.num_kv_heads),
    )


def verify_bytes(case: Case, inputs: VerifyInputs) -> int:
    shape = case.shape
    row = shape.num_kv_heads * shape.head_dim * inputs.k_cache.itemsize
    keys_and_values = 2 * row * sum(length + case.num_slots for length in kv_lengths(case))
    statistics = 3 * 4 * case.batch_size * shape.num_q_heads * case.num_slots
    plan = sum(_bytes(table) for table in inputs.plan)
    return (
        keys_and_values
        + 2 * _bytes(inputs.q)
        + statistics
        + plan
        + _bytes(inputs.ancestors)
        + _bytes(inputs.kv_len)
    )


def logits_of(case: Case, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Logits `[B, S, V]` as peaked as a language model's: the best token has about half the mass.

    The logits of a step are a matrix product's output, so contiguous.
    """
    size = (case.batch_size, case.num_slots, case.shape.vocabulary)
    _require(2 * _size(size, dtype), device)
    seed(case)
    logits = torch.randn(size, dtype=dtype, device=device)
    best = torch.randint(case.shape.vocabulary, (*size[:2], 3), device=device)
    heights = torch.tensor([1.0, 0.9, 0.8], device=device) * (math.log(size[2]) + 1)
    return logits.scatter_(2, best, heights.to(dtype).expand(*size[:2], 3))


def logits_bytes(case: Case, logits: Tensor, top_k: int) -> int:
    return _bytes(logits) + case.batch_size * case.num_slots * (8 * top_k + 8)


class AcceptInputs(NamedTuple):
    """Arguments of `ops.accept`, but for the policy."""

    logits: Tensor
    tokens: Tensor
    parents: Tensor
    num_slots: Tensor
    stats: ops.LogitStats
    relevance: Tensor


POLICIES = {
    "strict": AcceptancePolicy.strict(eos_ids=(2,)),
    "lvspec": AcceptancePolicy.lvspec(
        anchor_threshold=0.065, eos_ids=(2,), strict_ids=tuple(range(10, 40))
    ),
    "fly": AcceptancePolicy.fly(eos_ids=(2,)),
}


def accept_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> AcceptInputs:
    """A draft that is right four times of five, and else among the target's best."""
    logits = logits_of(case, device, dtype)
    stats = ops.logit_stats(logits, top_k=8)
    parents = parents_of(case)
    seen: dict[int, int] = {}
    ranks = []
    for parent in parents:  # siblings are different tokens: the best, the second best
        ranks.append(seen.get(parent, 0))
        seen[parent] = ranks[-1] + 1
    rank = torch.tensor(ranks).expand(case.batch_size, case.num_slots)
    rank = (rank + (torch.rand(rank.shape) < 0.2).long()).to(device)
    parent = torch.tensor(parents, dtype=torch.int32, device=device)
    parent = parent.repeat(case.batch_size, 1)
    rows = parent.long().clamp(min=0)[:, :, None].expand(-1, -1, 8)
    wanted = stats.top_ids.gather(1, rows).gather(2, rank[:, :, None])
    return AcceptInputs(
        logits,
        wanted[..., 0].long(),
        parent,
        torch.full((case.batch_size,), case.num_slots, dtype=torch.int32, device=device),
        stats,
        0.1 * torch.rand(case.batch_size, case.num_slots, device=device),
    )


def accept_bytes(case: Case, inputs: AcceptInputs) -> int:
    """One logit a node is read; results are path, kind, and three numbers a sequence."""
    logits, *others = inputs
    others[3:4] = others[3]
    nodes = case.batch_size * case.num_slots
    read = sum(_bytes(tensor) for tensor in others) + nodes * logits.itemsize
    return read + nodes * 5 + case.batch_size * 16


class GateInputs(NamedTuple):
    """Arguments of `ops.gate`."""

    relevance: Tensor
    num_slots: Tensor
    rule: Tensor
    seen: Tensor


def gate_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> GateInputs:
    """A quarter of the rows looks, here and in some fifty rows before; `dtype` is the logits'."""
    seed(case)
    size = (case.batch_size, case.num_slots)

    def rows_of(size: tuple[int, int]) -> Tensor:
        looks = (torch.rand(size) < 0.25).float()
        return (-6 + 3 * looks + 0.7 * torch.randn(size)).exp2()

    rule = torch.tensor([AcceptancePolicy.lvspec().rule] * case.batch_size)
    num_slots = torch.full(size[:1], case.num_slots, dtype=torch.int32)
    nothing = torch.zeros(case.batch_size, GATE_BINS, dtype=torch.int32)
    before = rows_of((case.batch_size, 50))
    seen = reference.gate(before, torch.full_like(num_slots, 50), rule, nothing).seen
    return GateInputs(*(x.to(device) for x in (rows_of(size), num_slots, rule, seen)))


def gate_bytes(case: Case, inputs: GateInputs) -> int:
    """Rule and counts are read and written."""
    return _bytes(inputs) + _bytes(inputs.rule) + _bytes(inputs.seen)


class SampledInputs(NamedTuple):
    """Arguments of `ops.accept_sampled`, at temperature 1."""

    logits: Tensor
    draft_logits: Tensor
    tokens: Tensor
    num_slots: Tensor
    uniforms: Tensor


def sampled_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> SampledInputs:
    """The draft is the target with noise, and its tokens are drawn from it."""
    logits = logits_of(case, device, dtype)
    size = (case.batch_size, case.num_slots)
    noise = torch.randn((size[0], size[1] - 1, logits.shape[2]), dtype=dtype, device=device)
    draft_logits = logits[:, :-1] + 0.5 * noise
    tokens = torch.zeros(size, dtype=torch.int64, device=device)
    for slot in range(1, case.num_slots):
        weights = draft_logits[:, slot - 1].float().softmax(-1)
        tokens[:, slot] = weights.multinomial(1)[:, 0]
    num_slots = torch.full(size[:1], case.num_slots, dtype=torch.int32, device=device)
    return SampledInputs(logits, draft_logits, tokens, num_slots, torch.rand(size, device=device))


def sampled_bytes(case: Case, inputs: SampledInputs) -> int:
    """Both models' logits once; a second look at the row in question is not counted."""
    return sum(_bytes(tensor) for tensor in inputs) + case.batch_size * (5 * case.num_slots + 16)


class CommitInputs(NamedTuple):
    """Arguments of `ops.commit_kv`."""

    k_cache: Tensor
    v_cache: Tensor
    kv_len: Tensor
    path: Tensor
    num_accepted: Tensor


def commit_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> CommitInputs:
    """All layers. The accepted path is the deepest of the draft, along the last children."""
    shape = case.shape
    stored = (
        *(shape.num_layers, case.batch_size, shape.num_kv_heads),
        *(capacity_of(case), shape.head_dim),
    )
    _require(2 * _size(stored, dtype), device)
    seed(case)
    caches = [torch.zeros(stored, dtype=dtype, device=device) for _ in range(2)]
    first, last = _window(case)
    for cache in caches:  # what is moved is random; the rest may be anything
        cache[..., first:last, :].normal_()
    parents = parents_of(case)
    walk = [case.num_slots - 1]
    while walk[-1] > 0:
        walk.append(parents[walk[-1]])
    path = walk[::-1] + [-1] * (case.num_slots - len(walk))
    return CommitInputs(
        *caches,
        torch.tensor(kv_lengths(case), dtype=torch.int32, device=device),
        torch.tensor([path] * case.batch_size, dtype=torch.int32, device=device),
        torch.full((case.batch_size,), len(walk) - 1, dtype=torch.int32, device=device),
    )


def committed_rows(case: Case, inputs: CommitInputs) -> list[Tensor]:
    """The rows of both caches around those that may change, without a copy."""
    first, last = _window(case)
    return [cache[..., first:last, :] for cache in inputs[:2]]


def commit_bytes(case: Case, inputs: CommitInputs) -> int:
    """Every row that moves is read and written, in K and V of all layers."""
    slots = inputs.path[0].tolist()
    moved = sum(slot > index for index, slot in enumerate(slots))
    shape = case.shape
    row = shape.num_layers * shape.num_kv_heads * shape.head_dim * inputs.k_cache.itemsize
    tables = sum(_bytes(tensor) for tensor in inputs[2:])
    return 2 * 2 * row * moved * case.batch_size + tables


def _window(case: Case) -> tuple[int, int]:
    lengths = kv_lengths(case)
    return max(min(lengths) - 4, 0), max(lengths) + case.num_slots + 4


class ImportanceInputs(NamedTuple):
    """Arguments of `ops.visual_importance`."""

    q: Tensor
    k_cache: Tensor
    kv_len: Tensor
    visual: Tensor
    lse: Tensor


def importance_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> ImportanceInputs:
    """The rows' lse is that of their attention to all committed positions."""
    shape = case.shape
    stored = (case.batch_size, shape.num_kv_heads, capacity_of(case), shape.head_dim)
    _require(_size(stored, dtype), device)
    seed(case)
    q_shape = (case.batch_size, case.num_slots, shape.num_q_heads, shape.head_dim)
    q = torch.randn(q_shape, dtype=dtype, device=device).transpose(1, 2)
    k_cache = torch.randn(stored, dtype=dtype, device=device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=device)
    for index, length in enumerate(kv_lengths(case)):
        for head in range(shape.num_q_heads):
            keys = k_cache[index, head // shape.group, :length].float()
            scores = q[index, head].float() @ keys.T * shape.head_dim**-0.5
            lse[index, head] = scores.logsumexp(-1)
    kv_len = torch.tensor(kv_lengths(case), dtype=torch.int32, device=device)
    return ImportanceInputs(q, k_cache, kv_len, visual_mask(case, device)[0], lse)


def importance_bytes(case: Case, inputs: ImportanceInputs) -> int:
    """K at video positions, the marks of committed ones, and a float32 for every position."""
    row = case.shape.num_kv_heads * case.shape.head_dim * inputs.k_cache.itemsize
    keys = row * int(inputs.visual.sum()) + sum(kv_lengths(case))
    return keys + _bytes(inputs.q) + _bytes(inputs.lse) + 4 * inputs.visual.numel()


class ExpandInputs(NamedTuple):
    """Arguments of `ops.expand_tree`, but for `width` and `top_k`."""

    logits: Tensor
    log_probs: Tensor
    slots: Tensor


EXPAND_WIDTH = 8


def expand_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> ExpandInputs:
    logits = logits_of(case, device, dtype)
    size = (case.batch_size, case.num_slots)
    slots = torch.arange(case.num_slots, dtype=torch.int32, device=device).repeat(size[0], 1)
    return ExpandInputs(logits, -5 * torch.rand(size, device=device), slots)


def expand_bytes(case: Case, inputs: ExpandInputs) -> int:
    return sum(_bytes(tensor) for tensor in inputs) + 16 * case.batch_size * EXPAND_WIDTH


def _bytes(value: Tensor | tuple) -> int:
    if isinstance(value, tuple):
        return sum(_bytes(part) for part in value)
    return value.numel() * value.itemsize


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _require(size: int, device: torch.device) -> None:
    """Raise `DoesNotFit` where `size` bytes and a tenth more would not be free."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    if size > 0.9 * free:
        raise DoesNotFit(f"needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
