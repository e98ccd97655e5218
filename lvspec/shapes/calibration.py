"""How well a scorer tells anchors from fillers, and which threshold keeps the captions right.

Everything here runs on the calibration split, whose scenes are never evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lvspec.config import DecodeConfig
from lvspec.engine.api import generate
from lvspec.engine.result import Generation
from lvspec.evaluation.methods import lvspec_method
from lvspec.models.loading import Pair
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.evaluation import Clip, run_methods, token_anchors


def collect_scores(
    pair: Pair,
    clips: list[Clip],
    config: DecodeConfig,
    scorer: str | Callable[..., Tensor],
    token_anchors: Callable[[Generation], list[bool]] = token_anchors,
) -> tuple[Tensor, Tensor]:
    """Relevance of every row of the target's own captions, and whether its token is an anchor.

    Returns:
        float32 `[n]` and bool `[n]` over all tokens of all clips but each caption's first.
    """
    config = replace(config, scorer=scorer, trace=True)
    scores, flags = [], []
    for clip in clips:
        result = generate(
            pair.target,
            pair.draft,
            clip.inputs,
            policy=AcceptancePolicy.strict(),
            config=config,
            tokenizer=pair.processor.tokenizer,
        )
        scores.append(result.relevance[0, 1:])
        flags.append(torch.tensor(token_anchors(result)[1:]))
    return torch.cat(scores), torch.cat(flags)


def lead(output: object) -> Tensor:
    """A scorer: nats by which the target's choice leads its second choice, float32 `[B, S]`."""
    first, second = output.logits.float().topk(2, dim=-1).values.unbind(-1)
    return first - second


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores above a negative; ties count half."""
    above, below = scores[positive].double(), scores[~positive].double().sort().values
    lower = torch.searchsorted(below, above, right=False)
    upper = torch.searchsorted(below, above, right=True)
    return float((lower + upper).double().mean() / 2 / len(below))


def sweep(
    pair: Pair, clips: list[Clip], config: DecodeConfig, thresholds: dict[str, float]
) -> list[dict[str, object]]:
    """Rows of the evaluation table for the lvspec policy at each threshold, strict first."""
    methods = {"strict": lvspec_method(pair, AcceptancePolicy.strict(), config)}
    for name, threshold in thresholds.items():
        policy = AcceptancePolicy.lvspec(anchor_threshold=threshold)
        methods[name] = lvspec_method(pair, policy, config)
    results = run_methods(methods, clips)
    return [result.summary(clips, results["strict"]) for result in results.values()]
