"""What `calibrate` is given: in order, checked, and by default."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from lvspec.calibration.fidelity import ANCHORS
from lvspec.checks import check_count
from lvspec.config import DecodeConfig
from lvspec.evaluation.samples import Sample
from lvspec.phases.draft import DraftChoice


def ordered(samples: Iterable[Sample], clips: int | None) -> list[Sample]:
    """In an order that has nothing to do with what is in them, and is the same every time."""
    found = sorted(samples, key=lambda sample: hashlib.sha256(sample.id.encode()).digest())
    if len({sample.id for sample in found}) < len(found):
        raise ValueError("samples: expected ids of which none comes twice, got one that does")
    if clips is not None:
        check_count("clips", clips, least=2)
        found = found[:clips]
    if len(found) < 2:
        raise ValueError(f"samples: expected at least 2 clips, got {len(found)}")
    return found


def checked(config: DecodeConfig | None, draft: DraftChoice) -> DecodeConfig:
    """How captions are run, but for the length of chains."""
    if draft is None or (isinstance(draft, str) and draft != "self"):
        raise ValueError(f"draft: expected a model or 'self', got {draft!r}")
    config = DecodeConfig() if config is None else config
    for name, wanted in (
        *(("temperature", 0.0), ("tree", None), ("draft_ngram", 0)),
        *(("stop_at_unsure_anchors", None), ("trace", False)),
    ):
        if getattr(config, name) != wanted:
            raise ValueError(
                f"{name}: expected {wanted}, for chains of greedy drafts are calibrated, got "
                f"{getattr(config, name)!r}"
            )
    if callable(config.scorer):
        raise ValueError("scorer: expected a name, which a profile can hold, got a function")
    return config


def drafting(config: DecodeConfig) -> dict[str, Any]:
    """What else is not as it is by default, of how drafts are made and rows are scored."""
    names = ("draft_keep", "draft_keep_by", "draft_vocab", "cache_dtype", "scorer")
    default = DecodeConfig()
    return {
        name: getattr(config, name)
        for name in names
        if getattr(config, name) != getattr(default, name)
    }


def metric_for(samples: Sequence[Sample]) -> str:
    """By what fidelity is measured where that is not said."""
    return "own_choice" if all(sample.choices for sample in samples) else ANCHORS
