"""Schema and shape function of `append`, which is the loop's own: `lvspec.commit` calls it with
tensors of which it knows shapes and dtypes, so it has no checked function in `lvspec.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec.reference.append import append

SCHEMA = (
    "(Tensor(a!) out_ids, Tensor(b!) out_kinds, Tensor(c!) out_relevance, Tensor(d!) num_out, "
    "Tensor max_new, Tensor(e!) last_two, Tensor(f!) regret_used, Tensor(g!) finished, "
    "Tensor eos_ids, Tensor(h!) kv_len, Tensor tokens, Tensor num_slots, Tensor path, "
    "Tensor num_accepted, Tensor bonus_id, Tensor kind, Tensor regret, Tensor lse, "
    "Tensor? relevance, int head, int bonus_kind, int no_nan) -> Tensor"
)


def _fake(*arguments: Tensor | int | None) -> Tensor:
    tokens, head = arguments[10], arguments[-3]
    return tokens.new_empty(tokens.shape[0], head + tokens.shape[1])


def register(library: torch.library.Library) -> None:
    """Define the operation, for all devices by its specification."""
    library.define("append" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("append", append, "CompositeExplicitAutograd")
    torch.library.register_fake("lvspec::append", _fake, lib=library)
