"""Which settings are worth a real run: by replay over recorded rows, the safest first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lvspec.calibration.candidates import GAMMAS, Candidate, policies, with_shifts
from lvspec.calibration.contexts import Contexts
from lvspec.calibration.fidelity import Fidelity, Score
from lvspec.calibration.replay import Walk, replay
from lvspec.calibration.runs import Record
from lvspec.calibration.timing import Pace
from lvspec.evaluation.samples import Sample
from lvspec.policy import AcceptancePolicy

MOST = 4
"""Candidates that are run for real, at most."""
FIRST_GAMMA = 12
"""At which policies are compared, before lengths are."""
_KEPT = 6
"""Policies that go into the second round, at most."""
_GAIN = 1.01
"""How much faster a riskier candidate must be to be worth anything."""


@dataclass(frozen=True)
class Prediction:
    """What a candidate is expected to do, by the recorded rows.

    Attributes:
        candidate: Settings.
        tau: Tokens per pass of the target.
        decode_speedup: Of decoding, over the target alone.
        speedup: Of whole captions.
        regret: Nats per token.
        fidelity: On the clips whose rows were recorded; of captions that are guessed in part.
        guessed: Share of passes for which other rows stood in.
    """

    candidate: Candidate
    tau: float
    decode_speedup: float
    speedup: float
    regret: float
    fidelity: float
    guessed: float

    @property
    def risk(self) -> tuple[float, float]:
        """The larger the riskier; regret decides where fidelity does not."""
        return 1 - self.fidelity, self.regret

    def to_dict(self) -> dict[str, float]:
        """Without the settings."""
        return {name: value for name, value in vars(self).items() if name != "candidate"}


class Search:
    """Predicts, from what was recorded of some clips.

    Args:
        clips: Samples and the target's own captions of them.
        contexts: What was recorded of each.
        pace: What iterations cost.
        gammas: Lengths of chains that are tried.
        fidelity: The metric.
        decode: Tokens to text.
        eos_ids, max_new_tokens: Of a run.
    """

    def __init__(
        self,
        clips: Sequence[tuple[Sample, Record]],
        contexts: Sequence[Contexts],
        pace: Pace,
        fidelity: Fidelity,
        *,
        gammas: Sequence[int],
        decode: Callable[[list[int]], str],
        eos_ids: Iterable[int],
        max_new_tokens: int,
    ) -> None:
        self._clips, self._contexts = clips, contexts
        self._pace, self._fidelity, self._decode = pace, fidelity, decode
        self._gammas = gammas
        self._run = {"eos_ids": tuple(eos_ids), "max_new_tokens": max_new_tokens}

    def predict(self, candidate: Candidate) -> Prediction:
        """What these settings do."""
        walks = replay(self._contexts, candidate.policy, candidate.gamma, **self._run)
        passes = max(sum(walk.iterations for walk in walks), 1)
        tokens = sum(len(walk.tokens) for walk in walks)
        return Prediction(
            candidate,
            sum(walk.num_emitted for walk in walks) / passes,
            *self._pace.speedups(walks, candidate.gamma),
            sum(walk.regret for walk in walks) / tokens,
            self._fidelity.value(self._scores(walks)),
            sum(walk.guessed for walk in walks) / passes,
        )

    def _scores(self, walks: Sequence[Walk]) -> list[Score]:
        scores = (
            self._fidelity.score(sample, self._caption(walk), own)
            for walk, (sample, own) in zip(walks, self._clips, strict=True)
        )
        return [score for score in scores if score is not None]

    def _caption(self, walk: Walk) -> dict[str, Any]:
        return {"tokens": walk.tokens, "text": self._decode(walk.tokens)}

    def best_length(self, policy: AcceptancePolicy) -> Prediction:
        """The fastest of a policy over all lengths."""
        found = [self.predict(Candidate(policy, gamma)) for gamma in self._gammas]
        return max(found, key=lambda each: each.decode_speedup)

    def front(self, base: AcceptancePolicy, rows: Sequence[float]) -> list[Prediction]:
        """Settings of which none is both safer and as fast as another, the safest first.

        Args:
            base: Whose guarded ids all policies have.
            rows: Relevance of rows of the target's own captions.
        """
        gamma = min(self._gammas, key=lambda length: abs(length - FIRST_GAMMA))
        first = _front(self.predict(Candidate(p, gamma)) for p in policies(rows, base))
        found = []
        for each in _spread(first, _KEPT):
            policy = each.candidate.policy
            found += [self.best_length(policy), self.best_length(with_shifts(policy))]
        return _front(found)

    def sequence(self, front: Sequence[Prediction]) -> list[Prediction]:
        """Those of a front that are run for real, in the order in which they are: safest first.

        Those of which the recorded clips do not say already that they lose too much; the safest,
        if they say it of all.
        """
        wanted = self._fidelity.wanted
        hopeful = [each for each in front if each.fidelity >= wanted]
        return _spread(hopeful or list(front[:1]), MOST)


def _front(predictions: Iterable[Prediction]) -> list[Prediction]:
    found: list[Prediction] = []
    for each in sorted(predictions, key=lambda p: (p.risk, -p.decode_speedup)):
        if not found or each.decode_speedup > found[-1].decode_speedup * _GAIN:
            found.append(each)
    return found


def _spread(predictions: Sequence[Prediction], most: int) -> list[Prediction]:
    """At most so many, the fastest among them, evenly by speed."""
    if len(predictions) <= most:
        return list(predictions)
    low, high = predictions[0].decode_speedup, predictions[-1].decode_speedup
    chosen = set()
    for k in range(most):
        wanted = low + (high - low) * k / (most - 1)
        distances = [abs(each.decode_speedup - wanted) for each in predictions]
        chosen.add(distances.index(min(distances)))
    return [predictions[i] for i in sorted(chosen)]


def lengths(gamma: int | str, max_new_tokens: int) -> list[int]:
    """Lengths of chains that are tried, given what `DecodeConfig` says."""
    if gamma != "auto":
        return [int(gamma)]
    return [length for length in GAMMAS if length < max_new_tokens] or [1]
