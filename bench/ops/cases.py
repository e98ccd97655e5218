"""The sizes that are measured and checked; their random inputs are in `case_inputs`.

Shapes are those of the models' configs. Three sets of cases: `small` runs anywhere in seconds,
`usual` is what a GPU measures in a few minutes, `full` is every combination of the lists below.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lvspec import tree


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
QWEN_72B = Shape("qwen2.5-vl-72b", 64, 8, 128, 80, 152064, 29568)
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

_WITHOUT_CONTEXT = {"logit_stats", "accept", "accept_sampled", "gate", "expand_tree"}
# These know of neither chains nor trees; the last is about trees.
_WITHOUT_TREES = {"logit_stats", "gate", "visual_importance", "expand_tree"}
_USUAL = {
    "verify_attention": _ATTENTION,
    "logit_stats": _LOGITS,
    "accept": _ACCEPT,
    "accept_sampled": [case for case in _ACCEPT if not case.is_tree],
    "gate": [case for case in _ACCEPT if not case.is_tree],
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
