"""What a decoding loop changes."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec.phases.sampling import Sampler
from lvspec.reference.kinds import BONUS


class DecodeState:
    """Everything that a decoding loop changes, at fixed addresses on the device.

    A sequence that is finished, or a place of the batch that has none, takes part in every
    iteration and nothing of it changes.

    Attributes:
        out_ids: int64 `[B, max_new_tokens + S]`; the first `num_out` are output, the rest scratch.
        out_kinds: uint8 of the same shape: exact, loose, shift, or `BONUS`.
        out_relevance: float32 of the same shape: relevance of the row that predicted the token, NaN
            where it was not computed.
        num_out: int32 `[B]`.
        max_new_tokens: int32 scalar.
        last_two: int64 `[B, 2]`, the last two committed tokens, the prompt's included.
        regret_used: float32 (float64 for a float64 target) `[B]`, nats.
        finished: bool `[B]`, at first all.
        is_text: bool `[B]`, whether there is nothing visual in the prompt.
        sampler: Random numbers of this iteration; None if the target's choice is its best token.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        max_new_tokens: int,
        num_slots: int,
        eos_ids: Tensor,
        regret_dtype: torch.dtype,
        sampler: Sampler | None = None,
    ) -> None:
        device = eos_ids.device
        shape = (batch_size, max_new_tokens + num_slots)
        self.eos_ids = eos_ids
        self.max_new_tokens = torch.tensor(max_new_tokens, dtype=torch.int32, device=device)
        self.out_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.out_kinds = torch.full(shape, BONUS, dtype=torch.uint8, device=device)
        self.out_relevance = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        self.num_out = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.last_two = torch.zeros(batch_size, 2, dtype=torch.int64, device=device)
        self.regret_used = torch.zeros(batch_size, dtype=regret_dtype, device=device)
        self.finished = torch.ones(batch_size, dtype=torch.bool, device=device)
        self.is_text = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.sampler = sampler

    def tensors(self) -> tuple[Tensor, ...]:
        """All that an iteration changes, in the order in which `commit` takes it."""
        return (
            self.out_ids,
            self.out_kinds,
            self.out_relevance,
            self.num_out,
            self.max_new_tokens,
            self.last_two,
            self.regret_used,
            self.finished,
            self.eos_ids,
        )

    def begin(self, sequence: int, last_prompt_token: Tensor, first_token: Tensor) -> None:
        """A sequence takes this place of the batch; both tokens int64 `[1]`."""
        self.out_ids[sequence, :1] = first_token
        self.out_kinds[sequence, 0] = BONUS
        self.out_relevance[sequence].fill_(torch.nan)
        self.num_out[sequence] = 1
        self.last_two[sequence] = torch.cat([last_prompt_token, first_token])
        self.regret_used[sequence] = 0
        self.finished[sequence] = (first_token == self.eos_ids).any() | (self.max_new_tokens <= 1)

    def finish(self, sequence: int) -> None:
        """Nothing more is generated for this sequence."""
        self.finished[sequence] = True
