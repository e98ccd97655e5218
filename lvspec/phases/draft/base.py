"""What every drafter gives and is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lvspec import ops
from lvspec.models.cache import Beginning, SlotCache
from lvspec.phases.slots import Draft, DraftShape
from lvspec.phases.state import DecodeState


class Drafter(ABC):
    """Proposes tokens for a batch of sequences.

    Attributes:
        gamma: Draft tokens in one verify pass at most; a pass has `gamma + 1` slots.
        depth: Draft tokens that can be accepted at most.
        finds: Whether tokens are looked up, and there may be none.
        only_root: Whether nothing is to be proposed where there are tokens to be found: a pass is
            then over the root alone. Asked for where the host knows of a find too late.
    """

    gamma: int
    finds = False
    only_root = False

    @property
    def depth(self) -> int:
        return self.gamma

    @property
    def has_plan(self) -> bool:
        """Whether kernels cut a cache of its own by a plan: without one they are others."""
        return False

    def active(self) -> AbstractContextManager[None]:
        """A context within which `propose` is called and models are ready for it."""
        return nullcontext()

    @abstractmethod
    def allocate(self, *, batch_size: int, capacity: int) -> None:
        """Make room for sequences of `capacity` positions; what there was before is kept."""

    def release(self) -> None:
        """Give the memory of `allocate` back, to be asked for more. Here: nothing to do."""
        return

    @abstractmethod
    def prefill(
        self,
        inputs: Mapping[str, Any] | None,
        sequence: int,
        *,
        prompt: Tensor,
        target_cache: SlotCache,
        beginning: Beginning | None = None,
    ) -> None:
        """Read the prompt of one sequence, which the target has read before.

        Args:
            inputs: The prompt as the draft's processor returns it; None where no draft model reads
                it.
            sequence: Its place in the batch.
            prompt: int64 `[1, T]`, the target's prompt.
            target_cache: Holds what the target read, in the same place.
            beginning: What another place has read of this prompt already, with the same pixels.
        """

    @abstractmethod
    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        """Tokens behind the last committed one of every sequence.

        Args:
            state: What was generated so far.
            target_kv_len: int32 `[B]`, positions committed in the target's cache (the root's is
                not among them).
        """

    def commit(self, draft: Draft, acceptance: ops.Acceptance, target_kv_len: Tensor) -> None:
        """Keep what was accepted; called before `target_kv_len` moves on. Here: nothing to do."""
        return


class NoDrafter(Drafter):
    """Plain autoregression: a root and nothing behind it."""

    gamma = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, *, batch_size: int, capacity: int) -> None:
        self._shape = DraftShape.chain(0, batch_size=batch_size, device=self._device)

    def prefill(
        self,
        inputs: Mapping[str, Any] | None,
        sequence: int,
        *,
        prompt: Tensor,
        target_cache: SlotCache,
        beginning: Beginning | None = None,
    ) -> None:
        pass

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        return Draft(state.last_two[:, 1:], self._shape)
