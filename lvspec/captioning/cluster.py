"""What processes of a cluster do for captions: a task that prepares a clip, an actor with models.

Who starts them, feeds them and starts them again is another matter (`lvspec.ray`).
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lvspec.captioning.alike import ALIKE, Pattern
from lvspec.captioning.calls import Calls
from lvspec.captioning.preparing import Checkpoints, Inputs, Recipe, own_warnings, reason
from lvspec.captioning.rows import Row, Settings, caption_row, error_row
from lvspec.captioning.shards import row_schema
from lvspec.checkpoint import find_checkpoint
from lvspec.config import DecodeConfig
from lvspec.engine.decoder import Decoder
from lvspec.evaluation.samples import Sample
from lvspec.models.loading import load_model, load_pair, load_processor, prepare_alike
from lvspec.models.quantize import Weights
from lvspec.phases.draft import DraftChoice
from lvspec.policy import AcceptancePolicy
from lvspec.profile import Profile

if TYPE_CHECKING:
    import pyarrow

_WITHOUT_MODEL = ("self", "ngram")


@dataclass(frozen=True)
class Setup:
    """The models of an actor, and how they decode; pickled for it.

    Attributes:
        target: Folder of a checkpoint, where every machine finds it.
        draft: Another, "self" or "ngram".
        device: Of both.
        batch_size: Captions decoded together.
        policy, config: As for `lvspec.generate`.
        frames: How frames are sampled, as plain values: captions depend on it.
        dtype, draft_weights, target_weights: As for `lvspec.load_pair`.
        profile: Made for this pair; None: nobody asked.
    """

    target: str
    draft: str
    device: str
    batch_size: int
    policy: AcceptancePolicy
    config: DecodeConfig
    frames: Mapping[str, Any]
    dtype: str = "auto"
    draft_weights: Weights | None = None
    target_weights: Weights | None = None
    profile: Profile | None = None

    def load(self) -> tuple[PreTrainedModel, DraftChoice, PreTrainedTokenizerBase]:
        """Target, draft, and the target's tokenizer.

        Raises:
            OSError, ValueError: See `lvspec.load_pair`; or the profile is for another pair.
        """
        transformers_logging.disable_progress_bar()
        target: PreTrainedModel
        draft: DraftChoice
        how = {"dtype": self.dtype, "device": self.device}
        if self.draft in _WITHOUT_MODEL:
            folder = find_checkpoint(self.target, "target")
            processor = load_processor(folder, "target")
            target = load_model(folder, "target", **how, weights=self.target_weights)
            draft = self.draft
        else:
            weights = {"draft_weights": self.draft_weights, "target_weights": self.target_weights}
            pair = load_pair(self.target, self.draft, **how, **weights)
            target, draft, processor = pair.target, pair.draft, pair.processor
        if self.profile is not None:
            self.profile.check(target, draft)
        return target, draft, processor.tokenizer

    def settings(self, target: PreTrainedModel, draft: DraftChoice) -> Settings:
        """Those of the rows."""
        return Settings.of(target, draft, self.policy, self.config, self.frames)


def recipe_of(
    target: str, draft: str, *, num_frames: int | None = None, fps: float | None = None
) -> Checkpoints:
    """How clips are prepared for a pair: once where both prepare them alike.

    Raises:
        OSError, ValueError: There is no checkpoint, or one of another kind; see `load_processor`.
    """
    folders = [find_checkpoint(target, "target")]
    processors = [load_processor(folders[0], "target")]
    if draft not in _WITHOUT_MODEL:
        folders.append(find_checkpoint(draft, "draft"))
        processors.append(load_processor(folders[1], "draft"))
        if prepare_alike(processors, folders):
            folders.pop()
    return Checkpoints(tuple(map(str, folders)), num_frames, fps)


def prepare(row: Mapping[str, Any], recipe: Recipe, prompt: str | None) -> dict[str, Any]:
    """A clip to what the actor takes: its inputs as bytes, or why there are none.

    Args:
        row: `id`, `video` (a path that every machine finds) and perhaps `prompt`.
        recipe: What prepares it; this process keeps what it loads.
        prompt: Where the row has none.

    Raises:
        ValueError: The row has no `id` or no `video`.
    """
    for name in ("id", "video"):
        if row.get(name) is None:
            raise ValueError(
                f"dataset: expected columns id and video, got {', '.join(sorted(row))} "
                f"with {name} missing"
            )
    asked = row.get("prompt") or prompt
    head = {"id": str(row["id"]), "video": str(row["video"]), "prompt": asked or ""}
    try:
        if not asked:
            raise ValueError("prompt: expected a text in the row or for all rows, got none")
        with own_warnings() as said:
            inputs = tuple(_loaded(recipe)(head["video"], asked))
    except Exception as error:  # whatever a decoder makes of a broken file
        return {**head, "inputs": b"", "warnings": [], "error": reason(error)}
    data = io.BytesIO()
    torch.save(inputs, data)
    words = list(dict.fromkeys(" ".join(str(each.message).split()) for each in said))
    return {**head, "inputs": data.getvalue(), "warnings": words, "error": ""}


@cache
def _loaded(recipe: Recipe) -> Callable[[str, str], Sequence[Inputs]]:
    torch.set_num_threads(1)
    return recipe.load()


class Captioner:
    """An actor: models that caption what it is called with, `batch_size` calls at a time.

    Where clip after clip fails in the same way it ends its process, whose device may be broken: one
    that fails is quick, and would be given everybody's clips. Whoever started it does so again.

    Args:
        setup: What to load.
    """

    def __init__(self, setup: Setup) -> None:
        target, draft, self._tokenizer = setup.load()
        self._settings = setup.settings(target, draft).digest
        self._device = target.device
        self._pattern, self._counting = Pattern(), threading.Lock()
        self._calls = Calls(
            Decoder(target, draft, setup.policy, setup.config, batch_size=setup.batch_size)
        )

    def __call__(self, clips: pyarrow.Table) -> pyarrow.Table:
        """Rows of the clips, one after the other; may be called by several threads."""
        import pyarrow

        rows = [self._row(clip) for clip in clips.to_pylist()]
        return pyarrow.Table.from_pylist(rows, row_schema())

    def _row(self, clip: Mapping[str, Any]) -> Row:
        sample = Sample(clip["id"], clip["video"], clip["prompt"])
        if clip["error"]:
            return error_row(sample, clip["error"], self._settings)
        try:
            target, *draft = torch.load(
                io.BytesIO(clip["inputs"]), map_location=self._device, weights_only=True
            )
            done = self._calls.generate(target, draft[0] if draft else None)
        except Exception as error:  # of HF's, torch's or the device's
            self._count(reason(error), sample)
            return error_row(sample, reason(error), self._settings)
        self._count(None, sample)
        row = caption_row(
            sample, done.generation, done.seconds, clip["warnings"] or (), self._settings
        )
        text = self._tokenizer.decode(row["tokens"], skip_special_tokens=True)
        return {**row, "caption": text.strip()}

    def _count(self, error: str | None, sample: Sample) -> None:
        with self._counting:
            alike = self._pattern.add(error, sample.video)
        if alike is not None:
            print(f"lvspec: {ALIKE} clips in a row fail with: {alike}", file=sys.stderr, flush=True)
            os._exit(1)


def settings_of(setup: Setup) -> Settings:
    """Those of the rows, from models that are loaded for it and given back."""
    target, draft, _ = setup.load()
    return setup.settings(target, draft)
