"""A trained small pair: its folder, its task, and the threshold of its gate."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from pairs_small.recipes import RECIPES

from lvspec.config import DecodeConfig
from lvspec.models.loading import Pair, load_pair
from lvspec.shapes import evaluation
from lvspec.shapes.calibration import collect_scores
from lvspec.shapes.tasks import Task

FACTS = "pair.json"  # {"recipe": name, "anchor_threshold": number}
CAUGHT = 0.99  # of the anchors of calibration scenes
CALIBRATION_CLIPS = 32


def write_facts(folder: Path, recipe: str, anchor_threshold: float) -> None:
    """Make `folder`, which has both models, a pair that `small_task` takes."""
    facts = {"recipe": recipe, "anchor_threshold": anchor_threshold}
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def load_small_pair(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Pair:
    """The target and the draft that `train.py` left in `folder`.

    Raises:
        OSError: a model is missing.
    """
    exported = (folder / role / "export" for role in ("target", "draft"))
    return load_pair(*exported, dtype=dtype, device=device)


def small_task(folder: Path) -> Task:
    """What a trained small pair was trained to do; its weights are read when it is loaded.

    Raises:
        ValueError: `folder` is none that `train.py` has finished.
    """
    path = folder / FACTS
    if not path.is_file():
        raise ValueError(
            f"folder: expected one that bench/pairs_small/train.py has finished, got {folder}, "
            f"which has no {FACTS}"
        )
    facts = json.loads(path.read_text())
    if facts.get("recipe") not in RECIPES:
        raise ValueError(
            f"folder: expected a recipe among {', '.join(sorted(RECIPES))} in {path}, "
            f"got {facts.get('recipe')!r}"
        )
    return _task(folder, facts["recipe"], facts["anchor_threshold"])


def _task(folder: Path, recipe: str, anchor_threshold: float) -> Task:
    world = RECIPES[recipe].world
    return Task(
        load=partial(load_small_pair, folder),
        make_clips=partial(evaluation.make_clips, world=world),
        token_anchors=partial(evaluation.token_anchors, world=world),
        oracle_gate=partial(evaluation.oracle_gate, world=world),
        read=world.read,
        anchor_threshold=anchor_threshold,
    )


def calibrate(folder: Path, recipe: str) -> float:
    """The peak that `CAUGHT` of the anchors reach, in the target's captions of calibration scenes.

    0, where every row is an anchor, for a target that says no anchor word.
    """
    task = _task(folder, recipe, anchor_threshold=0.0)
    pair = task.load()
    config = DecodeConfig(max_new_tokens=evaluation.MAX_NEW_TOKENS)
    with tempfile.TemporaryDirectory() as work:
        drawn = task.make_clips(pair, "calibration", CALIBRATION_CLIPS, Path(work))
        peaks, anchors = collect_scores(pair, drawn, config, "attention_peak", task.token_anchors)
    return float(peaks[anchors].quantile(1 - CAUGHT)) if anchors.any() else 0.0
