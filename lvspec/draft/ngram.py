"""What followed the last few tokens before is proposed again: no model drafts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lvspec.cache import SlotCache
from lvspec.draft.base import Draft, Drafter, DraftShape
from lvspec.state import DecodeState


class NGramDrafter(Drafter):
    """Looks the last tokens up in the prompt and the output, and proposes what stood behind them.

    On the device and of one shape in every iteration. A sequence in which they never stood before
    gets a root and no draft.

    Args:
        gamma: Draft tokens at most.
        ngram_max: The longest match that is looked for, see `look_up`.
        never: Ids that are not proposed, such as the placeholders of video tokens.
        device: Of the target.
    """

    def __init__(
        self, *, gamma: int, ngram_max: int, never: tuple[int, ...], device: torch.device
    ) -> None:
        self.gamma, self._ngram_max, self._device = gamma, ngram_max, device
        self._never = torch.tensor(never, dtype=torch.int64, device=device)
        self._ids: Tensor | None = None

    def allocate(self, *, batch_size: int, capacity: int) -> None:
        ids = torch.zeros(batch_size, capacity, dtype=torch.int64, device=self._device)
        if self._ids is None:
            self._prompt_len = torch.zeros(batch_size, dtype=torch.int32, device=self._device)
            self._shape = DraftShape.chain(self.gamma, batch_size=batch_size, device=self._device)
        else:
            ids[:, : self._ids.shape[1]] = self._ids
        self._ids = ids

    def prefill(
        self,
        inputs: Mapping[str, Any] | None,
        sequence: int,
        *,
        prompt: Tensor,
        target_cache: SlotCache,
    ) -> None:
        length = prompt.shape[1]
        self._ids[sequence, :length] = prompt[0]
        self._prompt_len[sequence] = length

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        # Prompt, output, and what is scratch behind the output, which the length leaves out.
        offsets = torch.arange(state.out_ids.shape[1], device=self._device)
        places = self._prompt_len[:, None] + offsets
        self._ids.scatter_(1, places, state.out_ids)
        tokens, count = look_up(
            self._ids,
            self._prompt_len + state.num_out,
            ngram_max=self._ngram_max,
            num_tokens=self.gamma,
            never=self._never,
        )
        shape = replace(self._shape, num_slots=count + 1)
        return Draft(torch.cat([state.last_two[:, 1:], tokens], dim=1), shape)


def look_up(
    ids: Tensor, length: Tensor, *, ngram_max: int, num_tokens: int, never: Tensor
) -> tuple[Tensor, Tensor]:
    """What stood behind the last tokens when they stood there before.

    The last `ngram_max` tokens are looked for, then one fewer, down to the last one alone; of the
    places of the longest match the latest counts. Nothing is read back from the device.

    Worked example, `ngram_max` 2: behind `7 8 1 7 8 2 9 7 8` the match is the second `7 8`, and
    `2 9 7 8` is proposed; behind `8 5 7 8` the match is `8` alone, and `5 7 8` is proposed.

    Args:
        ids: int64 `[B, N]`.
        length: int32 `[B]`, ids of each sequence; those behind do not count.
        ngram_max: Longest match, >= 1.
        num_tokens: Tokens to propose at most.
        never: int64 `[M]`, ids that are not proposed: the proposal ends before the first of them.

    Returns:
        tokens int64 `[B, num_tokens]` and how many of them are proposed, int32 `[B]`, 0 without a
        match. The others repeat the last token of the sequence.
    """
    capacity = ids.shape[1]
    places = torch.arange(capacity, device=ids.device)
    last = (length.long() - 1)[:, None]
    is_match = places < last  # where the last token stands, it is no match of itself
    matched = torch.zeros_like(ids)  # how many tokens match, those that end at each place
    for back in range(min(ngram_max, capacity)):
        wanted = ids.gather(1, (last - back).clamp(min=0))
        is_match = is_match & (ids.roll(back, dims=1) == wanted) & (places >= back)
        matched += is_match
    best, place = (matched * capacity + places).max(dim=1, keepdim=True)
    following = place + 1 + torch.arange(num_tokens, device=ids.device)
    tokens = ids.gather(1, following.clamp(max=capacity - 1))
    is_proposed = (following <= last) & (best >= capacity)
    is_proposed &= (tokens[..., None] != never).all(-1)
    is_proposed = is_proposed.int().cumprod(1) > 0  # nothing behind what is left out
    root = ids.gather(1, last.clamp(min=0))
    return torch.where(is_proposed, tokens, root), is_proposed.sum(1, dtype=torch.int32)
