"""append: what was accepted becomes output.

`lvspec.phases.commit` calls it with tensors of which it knows shapes and dtypes, so nothing is
checked. Arguments and result are those of `lvspec.reference.append.append`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

import lvspec.reference.append as specification
from lvspec.ops.backends import active_backend
from lvspec.ops.registry import define

_NAMES = tuple(inspect.signature(specification.append).parameters)
_LOOKED_AT = tuple(map(_NAMES.index, ("regret_used", "kv_len", "lse", "relevance")))
_WRITTEN = (
    "out_ids",
    "out_kinds",
    "out_relevance",
    "num_out",
    "last_two",
    "regret_used",
    "finished",
    "kv_len",
)


def append(*arguments: Any) -> Tensor:
    """The C++ takes float32 relevance, and log-sum-exps and regrets of one dtype."""
    regret_used, kv_len, lse, relevance = (arguments[index] for index in _LOOKED_AT)
    if active_backend(kv_len.device.type) == "cpp":
        is_taken = relevance is None or relevance.dtype == torch.float32
        if not is_taken or lse.dtype != regret_used.dtype:
            return specification.append(*arguments)
    return torch.ops.lvspec.append(*arguments)


def _shapes(tokens: Tensor, head: int) -> Tensor:
    return tokens.new_empty(tokens.shape[0], head + tokens.shape[1])


define("append", specification.append, _shapes, written=_WRITTEN)
