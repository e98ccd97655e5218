"""append: what was accepted becomes output.

`lvspec.phases.commit` calls it with tensors of which it knows shapes and dtypes, so it has no
checked function.
"""

from __future__ import annotations

from torch import Tensor

from lvspec.ops.registry import define
from lvspec.reference.append import append

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


def _shapes(tokens: Tensor, head: int) -> Tensor:
    return tokens.new_empty(tokens.shape[0], head + tokens.shape[1])


define("append", append, _shapes, written=_WRITTEN)
