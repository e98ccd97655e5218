"""The method: propose, verify, accept, commit. Everything else serves these four phases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from torch import Tensor

from lvspec.models.cache import SlotCache
from lvspec.models.model import Model
from lvspec.phases.accept import Judgement, accept, regrets
from lvspec.phases.agreement import first_draft, first_judgement
from lvspec.phases.commit import commit
from lvspec.phases.draft import Drafter
from lvspec.phases.logits import LogitsProcessors
from lvspec.phases.needs import Needs
from lvspec.phases.outcome import Outcome, Rows
from lvspec.phases.relevance import Scorer
from lvspec.phases.slots import Draft
from lvspec.phases.state import DecodeState
from lvspec.phases.verify import Verification, verify
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
        needs: Of the policies in the state.
        processors: Applied to the target's rows before anything else looks at them.
        scorer: Of the rows' relevance; None: it is not computed.
        state: What is generated so far; changed in place.
    """

    target: Model
    drafter: Drafter
    needs: Needs
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
            draft = first_draft(self.drafter.propose(state, cache.kv_len), self.target.ranks)
        with phase("verify"):
            verification = verify(self.target, cache, draft, self.scorer)
        with phase("accept"):
            verification = self._processed(verification, draft, committed)
            judgement = self.accept(verification, draft, cache)
            acceptance, stats, thresholds = first_judgement(judgement, self.target.ranks)
            costs = None
            if self.needs.loose:
                costs = regrets(verification.logits, draft, stats, acceptance)
        with phase("commit"):
            relevance = verification.relevance
            self.drafter.commit(draft, acceptance, cache.kv_len)
            report = commit(
                *(state, cache, draft, acceptance, relevance, stats.lse),
                regrets=costs,
                thresholds=thresholds if self.needs.relevance else None,
            )
            if draft.num_found is not None:
                report[:, NUM_SLOTS] = draft.num_found + 1
        wanted = stats.top_ids[..., 0]
        rows = Rows.of(verification.logits, draft, stats) if self.needs.trace else None
        return Outcome(draft, acceptance, wanted, relevance, thresholds, report, rows)

    def accept(self, verification: Verification, draft: Draft, cache: SlotCache) -> Judgement:
        """Phase 3 on the device. A measurement may put another in its place, of the same kind."""
        return accept(verification, draft, self.state, self.needs, cache.workspace)

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
