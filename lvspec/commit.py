"""Phase 4, commit: what was accepted becomes output, and lengths move on."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec import ops
from lvspec.cache import SlotCache
from lvspec.draft import Draft
from lvspec.state import BONUS, DecodeState


def commit(
    state: DecodeState,
    cache: SlotCache,
    draft: Draft,
    acceptance: ops.Acceptance,
    relevance: Tensor | None,
) -> None:
    """Append the accepted tokens and the bonus token, and move the target's `kv_len` on.

    After an end-of-sequence token nothing is kept, nor beyond `max_new_tokens`.

    Args:
        state: Changed in place.
        cache: The target's; `kv_len` is changed in place, and rows of a tree that were accepted
            move to where the sequence goes on (those of a chain stand there).
        draft: What was verified.
        acceptance: From phase 3.
        relevance: float32 `[B, S]`, or None.
    """
    if not draft.shape.is_chain:
        ops.commit_kv(cache.k, cache.v, cache.kv_len, acceptance.path, acceptance.num_accepted)
    tokens = draft.tokens
    path, accepted = acceptance.path.long(), acceptance.num_accepted[:, None]
    bonus = acceptance.bonus_id[:, None]
    offsets = state._offsets
    row = path.clamp(min=0)
    emitting = row.roll(-1, dims=1)
    is_draft = offsets < accepted
    emitted = torch.where(is_draft, tokens.gather(1, emitting), bonus)
    kinds = torch.where(is_draft, acceptance.kind.roll(-1, dims=1), BONUS).to(torch.uint8)

    is_path = offsets <= accepted
    ends = torch.isin(emitted, state.eos_ids) & is_path
    kept = (is_path & (ends.cumsum(1) - ends.long() == 0)).sum(1)
    kept = torch.minimum(kept, state.max_new_tokens - state.num_out)
    kept = kept.masked_fill(state.finished, 0).to(torch.int32)

    # The entries behind the kept ones are overwritten by the next commit.
    places = state.num_out[:, None] + offsets
    state.out_ids.scatter_(1, places, emitted)
    state.out_kinds.scatter_(1, places, kinds)
    if relevance is not None:
        state.out_relevance.scatter_(1, places, relevance.gather(1, row).float())
    previous = tokens.gather(1, row.gather(1, accepted.long()))
    state.last_two.copy_(torch.cat([previous, bonus], dim=1))
    state.regret_used.add_(acceptance.regret.masked_fill(state.finished, 0))
    state.num_out.add_(kept)
    state.finished |= ends.any(1) | (state.num_out >= state.max_new_tokens)
    # The rows of what is finished are never read again, and must not run out of the cache.
    cache.kv_len.add_((acceptance.num_accepted + 1).masked_fill(state.finished, 0))
