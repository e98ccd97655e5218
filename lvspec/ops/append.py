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
    given = dict(zip(_NAMES, arguments, strict=True))
    relevance, dtypes = given["relevance"], {given[name].dtype for name in ("lse", "regret_used")}
    if active_backend(given["kv_len"].device.type) == "cpp":
        if len(dtypes) > 1 or not (relevance is None or relevance.dtype == torch.float32):
            return specification.append(*arguments)
    return torch.ops.lvspec.append(*arguments)


def _shapes(tokens: Tensor, head: int) -> Tensor:
    return tokens.new_empty(tokens.shape[0], head + tokens.shape[1])


define("append", specification.append, _shapes, written=_WRITTEN)
