"""What target and draft say behind every beginning of a caption that was seen.

What a target's row holds, and what a greedy draft proposes, depends on the tokens before it and on
nothing else. So rows that traced runs leave are kept by these tokens, and any walk that stays among
them is what a run would have done. A strict run has the rows behind its rejections too, computed
over what was drafted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lvspec.engine.result import TraceStep

_SUFFIX = 8
"""Tokens of a context that are compared, at most, where another has to stand in for it."""


class Row(NamedTuple):
    """What the target says behind a context."""

    relevance: float
    entropy: float
    top_ids: list[int]
    top_log_probs: list[float]


class Proposal(NamedTuple):
    """What the draft says there, and what that would cost the target."""

    token: int
    log_prob: float
    regret: float


@dataclass(eq=False)
class Context:
    """A beginning of a caption.

    Attributes:
        parent: The same without its last token; None: nothing is generated yet.
        token: The last token; -1 for none.
        length: Tokens in it.
        row: What the target says behind it; None: that was not seen.
        proposal: What the draft says; None: that was not seen.
        following: Those that are one token longer.
    """

    parent: Context | None = None
    token: int = -1
    length: int = 0
    row: Row | None = None
    proposal: Proposal | None = None
    following: dict[int, Context] = field(default_factory=dict)

    def then(self, token: int) -> Context:
        """This and another token."""
        if token not in self.following:
            self.following[token] = Context(self, token, self.length + 1)
        return self.following[token]

    def backwards(self) -> Iterator[int]:
        """Its tokens, the last first."""
        context = self
        while context.parent is not None:
            yield context.token
            context = context.parent


class Contexts:
    """All that was seen of one clip.

    Args:
        captions: Of each traced run of it the output tokens and the steps of its trace.
    """

    def __init__(self, captions: Iterable[tuple[Sequence[int], Sequence[TraceStep]]]) -> None:
        self.start = Context()
        self._ending: dict[int, list[Context]] = {}
        self.first_token: int | None = None
        for tokens, steps in captions:
            self.first_token = tokens[0]
            for step in steps:
                self._add(tokens, step)

    def _add(self, tokens: Sequence[int], step: TraceStep) -> None:
        context = self.start
        for token in tokens[: step.position]:
            context = context.then(token)
        relevance = step.relevance or [0.0] * len(step.wanted)
        for slot in range(len(step.wanted)):
            if context.row is None:
                context.row = Row(
                    relevance[slot],
                    step.entropies[slot],
                    step.top_ids[slot],
                    step.top_log_probs[slot],
                )
                self._ending.setdefault(context.token, []).append(context)
            if slot == len(step.drafted):
                break
            token = step.drafted[slot]
            if context.proposal is None:
                context.proposal = Proposal(token, step.log_probs[slot], step.regrets[slot])
            context = context.then(token)

    def nearest(self, tokens: Sequence[int]) -> Context | None:
        """Of the contexts where both models were asked the one most like these tokens.

        The one with the most last tokens in common, of these the one of the nearest length; of
        equals the one that was seen first. None: nothing was seen at all.
        """
        every = self._ending.values()
        alike = [self._ending.get(tokens[-1], [])] if tokens else []
        candidates: list[Context] = []
        for groups in (alike, every):
            candidates = [each for g in groups for each in g if each.proposal is not None]
            if candidates:
                break
        else:
            return None
        length, last = len(tokens), tokens[: -_SUFFIX - 1 : -1]

        def likeness(context: Context) -> tuple[int, int]:
            common = 0
            for mine, theirs in zip(last, context.backwards()):
                if mine != theirs:
                    break
                common += 1
            return common, -abs(context.length - length)

        return max(candidates, key=likeness)


def contexts_of(captions: Iterable[Mapping[str, Any]]) -> Contexts:
    """Of captions as `Generation.to_dict` gives them, with their traces."""
    return Contexts(
        (caption["tokens"], [TraceStep.from_dict(step) for step in caption["trace"]])
        for caption in captions
    )
