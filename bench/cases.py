"""The sizes that are measured and checked, and random inputs of every operation at each of them.

Shapes are those of the models' configs. Three sets of cases: `small` runs anywhere in seconds,
`usual` is what a GPU measures in a few minutes, `full` is every combination of the lists below.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lvspec import ops, tree
from lvspec.policy import AcceptancePolicy


@dataclass(frozen=True)
class Shape:
    """What a model's config says of its text model; the hidden size is `num_q_heads * head_dim`.

    Attributes:
        tied: Whether the output matrix is the embedding itself: held once, and read once a pass.
        family: `model_type` of HF's class.
        of_layers: Layers of the real model where `num_layers` are fewer; None: all are there.
    """

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    vocabulary: int
    intermediate_size: int
    tied: bool = False
    family: str = "qwen2_5_vl"
    of_layers: int | None = None

    @property
    def hidden_size(self) -> int:
        return self.num_q_heads * self.head_dim

    @property
    def label(self) -> str:
        """The name, and how much of the model it is."""
        if self.of_layers is None:
            return self.name
        return f"{self.name} ({self.num_layers} of {self.of_layers} layers)"

    def with_layers(self, count: int) -> Shape:
        """This model cut to its first `count` layers, and labelled so."""
        return replace(self, num_layers=count, of_layers=self.of_layers or self.num_layers)

    @property
    def group(self) -> int:
        return self.num_q_heads // self.num_kv_heads


QWEN_3B = Shape("qwen2.5-vl-3b", 16, 2, 128, 36, 151936, 11008, tied=True)
QWEN_7B = Shape("qwen2.5-vl-7b", 28, 4, 128, 28, 152064, 18944)
QWEN_32B = Shape("qwen2.5-vl-32b", 40, 8, 128, 64, 152064, 27648)
# HF's converter adds two tokens to Qwen2's vocabulary and pads it to a multiple of 64.
LLAVA_05B = Shape(
    "llava-onevision-0.5b", 14, 2, 64, 24, 152000, 4864, tied=True, family="llava_onevision"
)
LLAVA_7B = Shape("llava-onevision-7b", 28, 4, 128, 28, 152128, 18944, family="llava_onevision")
LLAVA_72B = Shape("llava-onevision-72b", 64, 8, 128, 80, 152128, 29568, family="llava_onevision")
SMALL = Shape("small", 6, 2, 16, 2, 1031, 64)
ODD = Shape("odd", 5, 5, 9, 3, 257, 31)
WIDE = Shape("wide", 6, 2, 16, 2, 8195, 64)

SHAPES = (QWEN_3B, QWEN_7B, QWEN_32B, LLAVA_05B, LLAVA_7B, LLAVA_72B)
CONTEXTS = (4096, 16384, 65536)
NUM_SLOTS = (1, 2, 9, 17, 33, 64)
BATCH_SIZES = (1, 8, 32)


@dataclass(frozen=True)
class Case:
    """One size of one operation.

    Attributes:
        context: Committed tokens of the (first) sequence, of which the last 128 at most are
            generated; the operations on logits have none.
        num_slots: S. For visual_importance the query rows R, for expand_tree the nodes W.
        is_tree: Binary tree rather than a chain.
        is_ragged: Every sequence is 3 tokens shorter than the one before it.
    """

    shape: Shape
    context: int
    num_slots: int
    batch_size: int
    is_tree: bool = False
    is_ragged: bool = False

    def __str__(self) -> str:
        kind = "tree" if self.is_tree else "chain"
        words = [self.shape.name, f"n{self.context}"] if self.context else [self.shape.name]
        return "-".join([*words, f"s{self.num_slots}", f"b{self.batch_size}", kind])


class DoesNotFit(RuntimeError):
    """The inputs of a case are larger than the device's free memory."""


# The sizes that decide about speed: contexts of the default slots, all slots, batches, each model.
_ATTENTION = [
    *(Case(QWEN_7B, 16384, slots, 1) for slots in NUM_SLOTS),
    *(Case(QWEN_7B, context, 9, 1) for context in (4096, 65536)),
    *(Case(QWEN_7B, 16384, slots, 1, is_tree=True) for slots in (33, 64)),
    Case(QWEN_7B, 16384, 9, 8),
    Case(QWEN_7B, 4096, 9, 32),
    *(Case(QWEN_3B, 16384, slots, 1) for slots in (1, 2)),
    *(Case(LLAVA_05B, 16384, slots, 1) for slots in (1, 2)),
    Case(QWEN_32B, 16384, 9, 1),
    Case(QWEN_32B, 16384, 33, 8, is_tree=True),
    Case(LLAVA_72B, 16384, 9, 1),
]
_LOGITS = [
    Case(QWEN_7B, 0, 1, 1),
    Case(QWEN_7B, 0, 9, 1),
    Case(QWEN_7B, 0, 64, 1),
    Case(QWEN_7B, 0, 9, 8),
    Case(QWEN_7B, 0, 9, 32),
    Case(QWEN_7B, 0, 64, 32),
    Case(LLAVA_05B, 0, 1, 1),
]
_ACCEPT = [
    Case(QWEN_7B, 0, 9, 1),
    Case(QWEN_7B, 0, 9, 32),
    Case(QWEN_7B, 0, 33, 1),
    Case(QWEN_7B, 0, 64, 1, is_tree=True),
    Case(QWEN_7B, 0, 64, 32, is_tree=True),
]
_COMMIT = [
    *(Case(QWEN_7B, 4096, slots, 1, is_tree=True) for slots in (9, 33, 64)),
    *(Case(QWEN_7B, 4096, 64, batch, is_tree=True) for batch in (8, 32)),
    Case(QWEN_7B, 4096, 9, 8),
    *(Case(QWEN_32B, 4096, 64, batch, is_tree=True) for batch in (1, 8)),
    Case(LLAVA_72B, 4096, 64, 8, is_tree=True),
]
_IMPORTANCE = [
    *(Case(QWEN_7B, context, 33, 1) for context in CONTEXTS),
    *(Case(QWEN_7B, 16384, rows, 1) for rows in (1, 256)),
    Case(QWEN_32B, 16384, 33, 1),
    Case(LLAVA_72B, 16384, 33, 1),
    Case(QWEN_7B, 16384, 33, 8),
]
_EXPAND = [
    *(Case(QWEN_3B, 0, nodes, 1, is_tree=True) for nodes in (1, 8)),
    *(Case(LLAVA_05B, 0, nodes, 8, is_tree=True) for nodes in (1, 8)),
]

COMPILED = {
    Case(QWEN_7B, 16384, 9, 1),
    Case(QWEN_7B, 16384, 64, 1, is_tree=True),
    Case(QWEN_7B, 0, 9, 1),
    Case(QWEN_7B, 0, 64, 32),
}
"""Where peers that take many seconds to compile are measured."""

_WITHOUT_CONTEXT = {"logit_stats", "accept", "accept_sampled", "expand_tree"}
# These know of neither chains nor trees; the last is about trees.
_WITHOUT_TREES = {"logit_stats", "visual_importance", "expand_tree"}
_USUAL = {
    "verify_attention": _ATTENTION,
    "logit_stats": _LOGITS,
    "accept": _ACCEPT,
    "accept_sampled": [case for case in _ACCEPT if not case.is_tree],
    "commit_kv": _COMMIT,
    "visual_importance": _IMPORTANCE,
    "expand_tree": _EXPAND,
}
OPERATIONS = tuple(_USUAL)


def cases(operation: str, which: str) -> list[Case]:
    """The cases of an operation; `which` is small, usual or full."""
    contexts = (0,) if operation in _WITHOUT_CONTEXT else CONTEXTS
    if which == "usual":
        return list(_USUAL[operation])
    if which == "small":
        contexts = (0,) if operation in _WITHOUT_CONTEXT else (37,)
        chosen = _small(contexts)
    else:
        assert which == "full", which
        sizes = itertools.product(SHAPES, contexts, NUM_SLOTS, BATCH_SIZES)
        chosen = [Case(*size, is_tree=tree_) for size in sizes for tree_ in (False, True)]
    if operation == "accept_sampled":
        return [case for case in chosen if not case.is_tree]
    if operation in _WITHOUT_TREES:
        return [case for case in chosen if case.is_tree == (operation == "expand_tree")]
    return chosen


def _small(contexts: Iterable[int]) -> list[Case]:
    return [
        Case(shape, context, slots, batch_size, is_tree=is_tree, is_ragged=True)
        for context in contexts
        for shape, slots, batch_size in ((SMALL, 1, 1), (SMALL, 9, 3), (ODD, 5, 2))
        for is_tree in (False, True)
    ]


def odd_cases(operation: str) -> list[Case]:
    """Sizes around the edges of blocks, for checks on a device; too many to measure."""
    contexts = (0,) if operation in _WITHOUT_CONTEXT else (1, 130, 1025)
    shapes = (ODD, WIDE) if contexts == (0,) else (SMALL, ODD, QWEN_7B)
    layouts = (False,) if operation == "accept_sampled" else (False, True)
    if operation in _WITHOUT_TREES:
        layouts = (operation == "expand_tree",)
    sizes = itertools.product(shapes, contexts, (1, 2, 17, 64), (1, 5), layouts)
    return [
        Case(shape, context, slots, batch_size, is_tree=is_tree, is_ragged=True)
        for shape, context, slots, batch_size, is_tree in sizes
    ]


def seed(case: Case) -> None:
    """The same inputs for a case whatever ran before it."""
    torch.manual_seed(sum(map(ord, str(case))))


def parents_of(case: Case) -> list[int]:
    """The draft's parents: a chain, or the binary tree whose slots are numbered by level."""
    if not case.is_tree:
        return tree.chain_parents(case.num_slots).tolist()
    parents = [-1, *((slot - 1) // 2 for slot in range(1, case.num_slots))]
    tree.validate_tree(parents)
    return parents


def kv_lengths(case: Case) -> list[int]:
    step = 3 if case.is_ragged else 0
    return [max(case.context - step * index, 0) for index in range(case.batch_size)]


def capacity_of(case: Case) -> int:
    """Room for the slots and for what is still to be generated."""
    return case.context + max(case.num_slots, 64) + 256


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
    "lvspec": AcceptancePolicy.lvspec(eos_ids=(2,), strict_ids=tuple(range(10, 40))),
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
    """Every row that changes its place is read and written, in K and V of all layers."""
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
