"""append: what was accepted becomes output, and the lengths move on."""

from __future__ import annotations

import torch
from torch import Tensor

HEAD = 6
"""Columns of a report before the tokens, see `lvspec.engine.mailbox.Report`."""

NUM_SLOTS = 4
"""The column with how many slots were verified."""

NO_NAN = -1
"""In place of a row, where no row has a NaN."""


def append(
    out_ids: Tensor,
    out_kinds: Tensor,
    out_relevance: Tensor,
    num_out: Tensor,
    max_new: Tensor,
    last_two: Tensor,
    regret_used: Tensor,
    finished: Tensor,
    eos_ids: Tensor,
    kv_len: Tensor,
    tokens: Tensor,
    num_slots: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    bonus_id: Tensor,
    kind: Tensor,
    regret: Tensor,
    lse: Tensor,
    relevance: Tensor | None,
    head: int,
    bonus_kind: int,
    no_nan: int,
) -> Tensor:
    """Append the accepted tokens and the bonus token to the output; lengths move on.

    Some fifty operations on a few numbers each. Everything up to `kv_len` is changed in place.

    Args:
        out_ids: int64 `[B, W]`.
        out_kinds: uint8 `[B, W]`.
        out_relevance: float32 `[B, W]`; not written without `relevance`.
        num_out: int32 `[B]`, output tokens so far; there are S more columns behind them.
        max_new: int32 scalar, output tokens at most.
        last_two: int64 `[B, 2]`, the last two committed tokens.
        regret_used: float32 or float64 `[B]`.
        finished: bool `[B]`; of such a sequence nothing moves on.
        eos_ids: int64 `[E]`; behind one of these nothing is kept.
        kv_len: int32 `[B]`.
        tokens, num_slots: What was verified, int64 `[B, S]` and int32 `[B]`.
        path, num_accepted, bonus_id, kind, regret: From `accept`.
        lse: `[B, S]` like `regret_used`, NaN where a logit of the row is.
        relevance: `[B, S]` or None.
        head: Columns of the report before the tokens: 6.
        bonus_kind: Kind of the bonus token.
        no_nan: What stands for no row.

    Returns:
        int64 `[B, head + S]`: `num_out`, `finished`, the first row on the path with a NaN,
        `num_accepted`, `num_slots`, the bits of `regret_used` as a float64, and S tokens, of which
        those that `num_out` has grown by were appended.
    """
    path, accepted, bonus = path.long(), num_accepted[:, None], bonus_id[:, None]
    offsets = torch.arange(tokens.shape[1], device=tokens.device)
    row = path.clamp(min=0)  # what is no slot counts as the root, which is on every path
    is_draft = offsets < accepted
    emitted = torch.where(is_draft, tokens.gather(1, row.roll(-1, dims=1)), bonus)
    kinds = torch.where(is_draft, kind.roll(-1, dims=1), bonus_kind).to(torch.uint8)

    is_path = offsets <= accepted
    # (isin would ask a GPU for values where the ids are many.)
    ends = (emitted[..., None] == eos_ids).any(-1) & is_path
    kept = (is_path & (ends.cumsum(1) - ends.long() == 0)).sum(1)
    kept = torch.minimum(kept, max_new - num_out)
    kept = kept.masked_fill(finished, 0).to(torch.int32)

    # The entries behind the kept ones are overwritten by the next commit.
    columns = num_out[:, None] + offsets
    out_ids.scatter_(1, columns, emitted)
    out_kinds.scatter_(1, columns, kinds)
    if relevance is not None:
        out_relevance.scatter_(1, columns, relevance.gather(1, row).float())
    previous = tokens.gather(1, row.gather(1, accepted.long()))
    last_two.copy_(torch.cat([previous, bonus], dim=1))
    regret_used.add_(regret.masked_fill(finished, 0))
    num_out.add_(kept)
    finished.logical_or_(ends.any(1)).logical_or_(num_out >= max_new)
    # The rows of what is finished are never read again, and must not run out of the cache.
    kv_len.add_((num_accepted + 1).masked_fill(finished, 0))

    is_nan = lse.gather(1, row).isnan()
    first = row.gather(1, is_nan.int().argmax(1, keepdim=True))[:, 0]
    nan_row = torch.where(is_nan.any(1), first, no_nan)
    regret_bits = regret_used.double().view(torch.int64)
    columns = [num_out, finished, nan_row, num_accepted, num_slots, regret_bits]
    return torch.cat([torch.stack([x.long() for x in columns], dim=1), emitted], dim=1)
