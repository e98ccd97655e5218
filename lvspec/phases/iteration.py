"""The method: propose, verify, accept, commit. Everything else serves these four phases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from torch import Tensor

from lvspec.models.cache import SlotCache
from lvspec.models.model import Model
from lvspec.ops import Acceptance, LogitStats
from lvspec.phases.accept import accept, regrets
from lvspec.phases.commit import commit
from lvspec.phases.draft import Drafter
from lvspec.phases.logits import LogitsProcessors
from lvspec.phases.outcome import Outcome
from lvspec.phases.relevance import Scorer
from lvspec.phases.slots import Draft
from lvspec.phases.state import DecodeState
from lvspec.phases.verify import Verification, verify
from lvspec.policy import AcceptancePolicy
from lvspec.reference.append import NUM_SLOTS

Clock = Callable[[str], AbstractContextManager[None]]
"""A context that measures the phase of this name."""

Committed = Callable[[], Sequence[Tensor | None]]
"""Prompt and output of every place, int64 `[T]`; None for a place without a sequence."""


@dataclass
class Iteration:
    """One iteration over a batch of sequences: every one of them gets at least one token.

    Attributes:
        target, drafter: Who verifies, and who proposes.
        policy: Which draft tokens may be accepted, `eos_ids` included.
        processors: Applied to the target's rows before anything else looks at them.
        scorer: Of the rows' relevance; None: it is not computed.
        state: What is generated so far; changed in place.
    """

    target: Model
    drafter: Drafter
    policy: AcceptancePolicy
    processors: LogitsProcessors
    scorer: Scorer | None
    state: DecodeState

    def run(self, cache: SlotCache, phase: Clock, committed: Committed) -> Outcome:
        """Launch an iteration on the device; nothing of it is read back.

        (By this code. A logits processor may, and on a CPU some drafters look where they can stop.)

        Args:
            cache: The target's; changed in place.
            phase: Measures each phase.
            committed: Asked for logits processors that look at what stands before a row.
        """
        state = self.state
        with phase("draft"):
            if state.sampler is not None:
                state.sampler.advance()
            draft = self.drafter.propose(state, cache.kv_len)
        with phase("verify"):
            verification = verify(self.target, cache, draft, self.scorer)
        with phase("accept"):
            verification = self._processed(verification, draft, committed)
            acceptance, stats = self.accept(verification, draft, cache)
            costs = None
            if not self.policy.is_exact:
                costs = regrets(verification.logits, draft, stats, acceptance)
        with phase("commit"):
            relevance = verification.relevance
            self.drafter.commit(draft, acceptance, cache.kv_len)
            report = commit(
                *(state, cache, draft, acceptance, relevance, stats.lse),
                regrets=costs,
                anchor_threshold=self._threshold,
            )
            if draft.num_found is not None:
                report[:, NUM_SLOTS] = draft.num_found + 1
        return Outcome(draft, acceptance, stats.top_ids[..., 0], relevance, report)

    def accept(
        self, verification: Verification, draft: Draft, cache: SlotCache
    ) -> tuple[Acceptance, LogitStats]:
        """Phase 3 on the device. A measurement may put another in its place, of the same kind."""
        regret_used, sampler = self.state.regret_used, self.state.sampler
        is_strict = None if self._threshold is None else self.state.is_text
        return accept(
            *(verification, draft, self.policy, regret_used, cache.workspace),
            *(sampler, is_strict),
        )

    @property
    def _threshold(self) -> float | None:
        """Relevance from which on a row is an anchor; None: it decides nothing."""
        return self.policy.rule.anchor_threshold if self.policy.needs_relevance else None

    def _processed(
        self, verification: Verification, draft: Draft, committed: Committed
    ) -> Verification:
        """With the rows as the logits processors leave them."""
        if not self.processors:
            return verification
        before = committed() if self.processors.need_paths else []
        shape = draft.shape
        logits = self.processors.slots(
            verification.logits, draft.tokens, shape.ancestors, shape.num_slots, before
        )
        return replace(verification, logits=logits)
