"""Visual relevance: how much a row of the target looks at the video.

A scorer is a function of the target's `StepOutput` that returns float32 `[B, S]`. The relevance of
row p judges the token that row p predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lvspec.models.text_pass import StepOutput

Scorer = Callable[[StepOutput], Tensor]


def _mean_over(scores: Tensor, layers: Sequence[int] | None) -> Tensor:
    chosen = scores if layers is None else scores[list(layers)]
    return chosen.mean(dim=(0, 2))


def attention_peak(output: StepOutput, *, layers: Sequence[int] | None = None) -> Tensor:
    """Largest attention weight on one video token, averaged over heads and layers (the default).

    Args:
        output: What `Model.step(..., scores=True)` returned.
        layers: The layers to average over; None is all.
    """
    return _mean_over(output.peaks, layers)


def attention_mass(output: StepOutput, *, layers: Sequence[int] | None = None) -> Tensor:
    """Attention on all video tokens together, averaged over heads and layers.

    Args: as `attention_peak`.
    """
    return _mean_over(output.masses, layers)


SCORERS: dict[str, Scorer] = {
    "attention_peak": attention_peak,
    "attention_mass": attention_mass,
}


def get_scorer(scorer: str | Scorer) -> Scorer:
    """The scorer of this name, or the function itself.

    Raises:
        ValueError: There is no such name.
        TypeError: Neither a name nor a function.
    """
    if callable(scorer):
        return scorer
    if not isinstance(scorer, str):
        raise TypeError(f"scorer: expected a name or a function, got {scorer!r}")
    if scorer not in SCORERS:
        raise ValueError(f"scorer: expected one of {', '.join(SCORERS)}, got {scorer!r}")
    return SCORERS[scorer]
