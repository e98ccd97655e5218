"""The recorded captions again, with thresholds around the one that was used.

A replay (`lvspec.calibration.replay`): rows as they were recorded and the rule of the loop, no
model. Where another decision leads to rows that were not recorded, the most similar ones stand in,
and `guessed` says how often.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lvspec.calibration.contexts import Contexts
from lvspec.calibration.replay import replay
from lvspec.phases.needs import TRACED_TOP_K
from lvspec.policy import AcceptancePolicy
from lvspec.reporting.tokens import Caption

FACTORS = (0.0, 0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0, math.inf)
"""Of the threshold that was used in the end; 0: every row is an anchor, inf: none is."""


@dataclass(frozen=True)
class Replayed:
    """What a threshold gives.

    Attributes:
        factor: Of the threshold that was used; None: the policy as it was.
        threshold: Its mean over the captions.
        tau: Tokens of a pass, the bonus token included.
        agreement: Share of the tokens that are the target's own choice where they stand.
        regret: Nats lost per token.
        guessed: Share of the passes for which similar rows stood in.
    """

    factor: float | None
    threshold: float
    tau: float
    agreement: float
    regret: float
    guessed: float


@dataclass(frozen=True)
class Replays:
    """All thresholds, the policy as it was first; or why there are none.

    Attributes:
        missing: Why; empty where there are some.
    """

    points: tuple[Replayed, ...] = ()
    missing: str = ""

    @property
    def is_flat(self) -> bool:
        """Whether all thresholds give the same."""
        return len({(p.tau, p.agreement, p.regret) for p in self.points}) == 1


def replay_thresholds(captions: Sequence[Caption], facts: Mapping[str, Any]) -> Replays:
    """Thresholds around the one that was used, over captions with traces.

    Args:
        captions: Those without a trace are left out.
        facts: `policy` and `config` of the run, as `lvspec generate` writes them.
    """
    traced = [caption for caption in captions if caption.steps]
    if not traced:
        return Replays(missing="there is no trace (lvspec generate --trace --json FILE)")
    values, gamma = facts.get("policy"), traced[0].stats.get("gamma")
    if gamma == 0:
        return Replays(missing="nothing was drafted")
    if values is None or gamma is None:
        return Replays(missing="the file does not say with which policy and gamma it was made")
    if (facts.get("config") or {}).get("temperature"):
        return Replays(missing="the target sampled, and other samples were not recorded")
    policy = AcceptancePolicy.from_dict(values)
    if not policy.needs_relevance:
        return Replays(missing=f"the policy, {policy.name}, has no gate")
    if policy.needed_top_k > TRACED_TOP_K:
        return Replays(missing=f"the policy asks for more than the {TRACED_TOP_K} best of a row")
    if any(step.relevance is None for caption in traced for step in caption.steps):
        return Replays(missing="no relevance was recorded")
    chain = (list(range(len(step.parents))) == step.parents for c in traced for step in c.steps)
    if not all(chain):
        return Replays(missing="drafts were trees, and only chains can be replayed")
    used = [_threshold(caption) for caption in traced]
    if not all(math.isfinite(threshold) for threshold in used):
        return Replays(missing="the gate found no threshold, so there is none to vary")
    factors = (None, *FACTORS)
    return Replays(tuple(_at(factor, traced, used, policy, int(gamma)) for factor in factors))


def _threshold(caption: Caption) -> float:
    return caption.steps[-1].anchor_threshold


def _at(
    factor: float | None,
    captions: Sequence[Caption],
    used: Sequence[float],
    policy: AcceptancePolicy,
    gamma: int,
) -> Replayed:
    iterations = emitted = mismatches = guessed = 0
    regret = 0.0
    for caption, threshold in zip(captions, used):
        tokens = caption.result["tokens"]
        ends = () if caption.tokens[-1].text else tokens[-1:]
        if factor is not None:
            # 0 x inf is no number, and a relevance of 0 is an anchor too where all are.
            scaled = -math.inf if factor == 0 else threshold * factor
            policy = replace(policy, anchor_threshold=scaled)
        (walk,) = replay(
            [Contexts([(tokens, caption.steps)])],
            policy,
            gamma,
            eos_ids=ends,
            max_new_tokens=len(tokens) if not ends else 2 * len(tokens),
        )
        iterations += walk.iterations
        emitted += walk.num_emitted
        mismatches += walk.mismatches
        guessed += walk.guessed
        regret += walk.regret
    return Replayed(
        factor,
        sum(used) / len(used) * (1.0 if factor is None else factor),
        emitted / iterations,
        1 - mismatches / emitted,
        regret / emitted,
        guessed / iterations,
    )
