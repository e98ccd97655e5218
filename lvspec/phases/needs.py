"""What an iteration has to compute for the policies of its sequences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from lvspec.policy import AcceptancePolicy

TRACED_TOP_K = 5
"""Best tokens of a row that a trace keeps."""


@dataclass(frozen=True)
class Needs:
    """What the work of an iteration depends on besides tensors: what a captured graph is made for.

    All that policies differ in otherwise is in tensors, see `lvspec.ops.Rules`.

    Attributes:
        top_k: Best tokens of a row that are kept.
        loose: Whether a mismatch may ever be accepted.
        relevance: Whether the visual relevance of rows decides anything.
        gate: Whether a sequence finds its own threshold.
        chance: Whether rows are anchors by chance.
        rate: Whether a budget grows with the output.
        strict_ids: Guarded ids of one sequence, at most.
        trace: Whether everything about the rows is kept.
    """

    top_k: int = 1
    loose: bool = False
    relevance: bool = False
    gate: bool = False
    chance: bool = False
    rate: bool = False
    strict_ids: int = 0
    trace: bool = False

    @classmethod
    def of(cls, policies: Iterable[AcceptancePolicy]) -> Needs:
        """Of sequences with these policies."""
        needs = cls()
        for policy in policies:
            needs |= cls(
                policy.needed_top_k,
                not policy.is_exact,
                policy.needs_relevance,
                policy.is_calibrating,
                policy.random_share is not None,
                policy.regret_rate > 0,
                len(policy.strict_ids),
            )
        return needs

    def traced(self, vocab_size: int) -> Needs:
        """With all that a trace keeps, of rows over so many tokens."""
        return self | Needs(top_k=min(TRACED_TOP_K, vocab_size), trace=True)

    def __or__(self, other: Needs) -> Needs:
        """Of both."""
        return Needs(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))
