"""What a decoding loop changes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lvspec import ops
from lvspec.phases.sampling import Sampler
from lvspec.policy import AcceptancePolicy
from lvspec.reference.kinds import BONUS
from lvspec.rule import GATE_BINS, strict_rule


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
        rules: Policies of the sequences; the eos ids are those of all.
        seen: int32 `[B, 64]`, rows of each sequence by their relevance, see `lvspec.ops.gate`.
        sampler: Random numbers of this iteration; None if the target's choice is its best token.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        max_new_tokens: int,
        num_slots: int,
        rules: ops.Rules,
        regret_dtype: torch.dtype,
        sampler: Sampler | None = None,
    ) -> None:
        device = rules.numbers.device
        shape = (batch_size, max_new_tokens + num_slots)
        self.rules = rules
        self.max_new_tokens = torch.tensor(max_new_tokens, dtype=torch.int32, device=device)
        self.out_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.out_kinds = torch.full(shape, BONUS, dtype=torch.uint8, device=device)
        self.out_relevance = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        self.num_out = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.last_two = torch.zeros(batch_size, 2, dtype=torch.int64, device=device)
        self.regret_used = torch.zeros(batch_size, dtype=regret_dtype, device=device)
        self.finished = torch.ones(batch_size, dtype=torch.bool, device=device)
        self.seen = torch.zeros(batch_size, GATE_BINS, dtype=torch.int32, device=device)
        self.sampler = sampler

    @property
    def eos_ids(self) -> Tensor:
        """int64 `[F]`."""
        return self.rules.eos_ids

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

    def make_room(self, num_strict_ids: int) -> None:
        """For so many guarded ids of a sequence; tensors may move."""
        more = num_strict_ids - self.rules.strict_ids.shape[1]
        if more > 0:
            strict_ids = pad(self.rules.strict_ids, (0, more), value=-1)
            self.rules = self.rules._replace(strict_ids=strict_ids)

    def begin(
        self,
        sequence: int,
        last_prompt_token: Tensor,
        first_token: Tensor,
        policy: AcceptancePolicy,
        is_text: Tensor,
    ) -> None:
        """A sequence takes this place of the batch.

        Args:
            sequence: The place.
            last_prompt_token, first_token: int64 `[1]`.
            policy: Of the sequence, with no more `strict_ids` than there is room for.
            is_text: bool scalar, whether there is nothing visual in the prompt: then a policy that
                looks at relevance is strict.
        """
        columns = self.rules.strict_ids.shape[1]
        rules = ops.Rules.of([policy], (), is_text.device, num_strict_ids=columns)
        numbers = rules.numbers
        if policy.needs_relevance:
            strict = strict_rule(policy.rule)._replace(gate_rows=0.0)
            numbers = torch.where(is_text, numbers.new_tensor([strict]), numbers)
        self.rules.numbers[sequence] = numbers[0]
        self.rules.strict_ids[sequence] = rules.strict_ids[0]
        self.seen[sequence] = 0
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
