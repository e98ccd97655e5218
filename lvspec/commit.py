"""Phase 4, commit: what was accepted becomes output, and lengths move on."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec import ops
from lvspec.cache import SlotCache

BONUS = 3
"""Kind of a token that the target chose itself; 0 exact, 1 loose, 2 shift are `ops.accept`'s."""


class DecodeState:
    """Everything that a decoding loop changes, at fixed addresses on the device.

    Attributes:
        out_ids: int64 `[B, max_new_tokens + S]`; the first `num_out` are output, the rest scratch.
        out_kinds: uint8 of the same shape: exact, loose, shift, or `BONUS`.
        out_relevance: float32 of the same shape: relevance of the row that predicted the token, NaN
            where it was not computed.
        num_out: int32 `[B]`.
        last_two: int64 `[B, 2]`, the last two committed tokens, the prompt's included.
        regret_used: float32 (float64 for a float64 target) `[B]`, nats.
        finished: bool `[B]`.
    """

    def __init__(
        self,
        last_prompt_token: Tensor,
        first_token: Tensor,
        *,
        max_new_tokens: int,
        num_slots: int,
        eos_ids: Tensor,
        regret_dtype: torch.dtype,
    ) -> None:
        device, batch_size = first_token.device, first_token.shape[0]
        shape = (batch_size, max_new_tokens + num_slots)
        self.max_new_tokens, self.eos_ids = max_new_tokens, eos_ids
        self.out_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.out_kinds = torch.full(shape, BONUS, dtype=torch.uint8, device=device)
        self.out_relevance = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        self.out_ids[:, 0] = first_token
        self.num_out = torch.ones(batch_size, dtype=torch.int32, device=device)
        self.last_two = torch.stack([last_prompt_token, first_token], dim=1)
        self.regret_used = torch.zeros(batch_size, dtype=regret_dtype, device=device)
        self.finished = torch.isin(first_token, eos_ids) | (max_new_tokens <= 1)
        self._offsets = torch.arange(num_slots, device=device)


def commit(
    state: DecodeState,
    cache: SlotCache,
    tokens: Tensor,
    acceptance: ops.Acceptance,
    relevance: Tensor | None,
) -> None:
    """Append the accepted tokens and the bonus token, and move the target's `kv_len` on.

    A chain's accepted rows already stand where they belong in the cache, so none is moved. After
    an end-of-sequence token nothing is kept, nor beyond `max_new_tokens`.

    Args:
        state: Changed in place.
        cache: The target's; `kv_len` is changed in place.
        tokens: int64 `[B, S]`, slot 0 the root.
        acceptance: From phase 3.
        relevance: float32 `[B, S]`, or None.
    """
    path, accepted = acceptance.path.long(), acceptance.num_accepted[:, None]
    offsets = state._offsets
    row = path.clamp(min=0)
    emitting = row.roll(-1, dims=1)
    is_draft = offsets < accepted
    emitted = torch.where(is_draft, tokens.gather(1, emitting), acceptance.bonus_id[:, None])
    kinds = torch.where(is_draft, acceptance.kind.roll(-1, dims=1), BONUS).to(torch.uint8)

    ends = torch.isin(emitted, state.eos_ids) & (offsets <= accepted)
    before_end = ends.cumsum(1) - ends.long() == 0
    kept = ((offsets <= accepted) & before_end).sum(1)
    kept = torch.minimum(kept, state.max_new_tokens - state.num_out)
    kept = kept.masked_fill(state.finished, 0).to(torch.int32)

    # The entries behind the kept ones are overwritten by the next commit.
    places = state.num_out[:, None] + offsets
    state.out_ids.scatter_(1, places, emitted)
    state.out_kinds.scatter_(1, places, kinds)
    if relevance is not None:
        state.out_relevance.scatter_(1, places, relevance.gather(1, row).float())
    previous = tokens.gather(1, row.gather(1, accepted.long()))
    state.last_two = torch.cat([previous, acceptance.bonus_id[:, None]], dim=1)
    state.regret_used += acceptance.regret
    state.num_out += kept
    state.finished |= ends.any(1) | (state.num_out >= state.max_new_tokens)
    cache.kv_len += acceptance.num_accepted + 1
