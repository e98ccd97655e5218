"""Phase 4, commit: what was accepted becomes output, and lengths move on."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec import ops
from lvspec.cache import SlotCache
from lvspec.draft import Draft
from lvspec.reports import NO_NAN
from lvspec.state import BONUS, DecodeState


def commit(
    state: DecodeState,
    cache: SlotCache,
    draft: Draft,
    acceptance: ops.Acceptance,
    relevance: Tensor | None,
    lse: Tensor,
) -> Tensor:
    """Append the accepted tokens and the bonus token, and move the target's `kv_len` on.

    After an end-of-sequence token nothing is kept, nor beyond `max_new_tokens`.

    Args:
        state: Changed in place.
        cache: The target's; `kv_len` is changed in place, and rows of a tree that were accepted
            move to where the sequence goes on (those of a chain stand there).
        draft: What was verified.
        acceptance: From phase 3.
        relevance: float32 `[B, S]`, or None.
        lse: float32 `[B, S]`, of the target's rows; NaN where a logit is.

    Returns:
        What the host wants to know, int64 `[B, HEAD + S]`: the fields of `reports.Report`, the
        regret as the bits of a float64.
    """
    if not draft.shape.is_chain:
        ops.commit_kv(cache.k, cache.v, cache.kv_len, acceptance.path, acceptance.num_accepted)
    drafted = (draft.tokens, draft.shape.num_slots)
    given = (*state.tensors(), cache.kv_len, *drafted, *acceptance, lse, relevance)
    if _is_fast(cache.kv_len.device, relevance, lse, state.regret_used):
        return torch.ops.lvspec.cpu_append(*given, BONUS, NO_NAN)
    return append(*given)


def _is_fast(device: torch.device, relevance: Tensor | None, *same: Tensor) -> bool:
    """Whether csrc/append.h does it: thirty operations on a few numbers each, in one."""
    return (
        device.type == "cpu"
        and ops.active_backend("cpu") == "cpp"
        and (relevance is None or relevance.dtype == torch.float32)
        and len({x.dtype for x in same}) == 1
    )


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
) -> Tensor:
    """What `commit` does, of the tensors it changes and those it reads; returns its report."""
    path, accepted, bonus = path.long(), num_accepted[:, None], bonus_id[:, None]
    offsets = torch.arange(tokens.shape[1], device=tokens.device)
    row = path.clamp(min=0)  # what is no slot counts as the root, which is on every path
    is_draft = offsets < accepted
    emitted = torch.where(is_draft, tokens.gather(1, row.roll(-1, dims=1)), bonus)
    kinds = torch.where(is_draft, kind.roll(-1, dims=1), BONUS).to(torch.uint8)

    is_path = offsets <= accepted
    # (isin would ask a GPU for values where the ids are many.)
    ends = (emitted[..., None] == eos_ids).any(-1) & is_path
    kept = (is_path & (ends.cumsum(1) - ends.long() == 0)).sum(1)
    kept = torch.minimum(kept, max_new - num_out)
    kept = kept.masked_fill(finished, 0).to(torch.int32)

    # The entries behind the kept ones are overwritten by the next commit.
    places = num_out[:, None] + offsets
    out_ids.scatter_(1, places, emitted)
    out_kinds.scatter_(1, places, kinds)
    if relevance is not None:
        out_relevance.scatter_(1, places, relevance.gather(1, row).float())
    previous = tokens.gather(1, row.gather(1, accepted.long()))
    last_two.copy_(torch.cat([previous, bonus], dim=1))
    regret_used.add_(regret.masked_fill(finished, 0))
    num_out.add_(kept)
    finished.logical_or_(ends.any(1)).logical_or_(num_out >= max_new)
    # The rows of what is finished are never read again, and must not run out of the cache.
    kv_len.add_((num_accepted + 1).masked_fill(finished, 0))

    is_nan = lse.gather(1, row).isnan()
    first = row.gather(1, is_nan.int().argmax(1, keepdim=True))[:, 0]
    nan_row = torch.where(is_nan.any(1), first, NO_NAN)
    regret_bits = regret_used.double().view(torch.int64)
    head = [num_out, finished, nan_row, num_accepted, num_slots, regret_bits]
    return torch.cat([torch.stack([x.long() for x in head], dim=1), emitted], dim=1)
