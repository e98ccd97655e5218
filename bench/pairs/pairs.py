"""Which pairs are measured at which sizes, what they take of a device's memory, and by whom.

Pairs have the shapes of real models and random weights (see `random_models`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from limits import kv_bytes, parameters
from ops.cases import LLAVA_05B, LLAVA_7B, LLAVA_72B, QWEN_3B, QWEN_7B, QWEN_32B, Shape


@dataclass(frozen=True)
class Pair:
    """A target, a draft, and the name that chooses them."""

    name: str
    target: Shape
    draft: Shape

    @property
    def label(self) -> str:
        return f"{self.target.label} <- {self.draft.label}"


_TINY = Shape("tiny", 6, 2, 16, 4, 1031, 64)
_TINY_DRAFT = Shape("tiny draft", 4, 2, 16, 2, 1024, 64, tied=True)
_REAL = (
    Pair("qwen-7b-3b", QWEN_7B, QWEN_3B),
    Pair("qwen-32b-7b", QWEN_32B, QWEN_7B),
    Pair("qwen-32b-3b", QWEN_32B, QWEN_3B),
    Pair("llava-7b-0.5b", LLAVA_7B, LLAVA_05B),
    # Whole it is 145 GB in bfloat16, more than one GPU here has.
    Pair("llava-72b-7b", LLAVA_72B.with_layers(40), LLAVA_7B),
    Pair("llava-72b-7b-short", LLAVA_72B.with_layers(20), LLAVA_7B),
)
_TINY_PAIRS = (
    Pair("tiny", _TINY, _TINY_DRAFT),
    Pair(
        "tiny-llava",
        replace(_TINY, name="tiny llava", family="llava_onevision").with_layers(2),
        replace(_TINY_DRAFT, name="tiny llava draft", family="llava_onevision"),
    ),
)
PAIRS = {pair.name: pair for pair in (*_REAL, *_TINY_PAIRS)}
REAL = [pair.name for pair in _REAL]

CONTEXTS, BATCH_SIZES = (16384, 4096, 65536), (1, 8)
"""The one that the figures to reach are about comes first."""


@dataclass(frozen=True)
class Size:
    """Tokens of every prompt, and sequences."""

    context: int
    batch_size: int


def sizes(contexts: list[int], batch_sizes: list[int]) -> Iterator[Size]:
    for batch_size in batch_sizes:
        for context in contexts:
            yield Size(context, batch_size)


def needed_bytes(pair: Pair, size: Size, *, tokens: int, itemsize: int) -> int:
    """Weights and caches of a pair.

    Args:
        tokens: Positions of a cache behind the prompt.
        itemsize: Bytes of a weight, a key, a value.
    """
    rows = size.batch_size * (size.context + tokens)
    return sum(
        parameters(shape)[1] * itemsize + rows * kv_bytes(shape, itemsize)
        for shape in (pair.target, pair.draft)
    )


def free_bytes(device: torch.device) -> int:
    """Memory of the device that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def does_not_fit(needed: int, free: int) -> str | None:
    """Why a pair is left out; None if it fits, with a tenth to spare for what passes need."""
    if 1.1 * needed <= free:
        return None
    return f"needs {1.1 * needed / 1e9:.0f} GB, has {free / 1e9:.0f} GB"
