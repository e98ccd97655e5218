"""The run of an evaluation: what is missing in its journal is captioned and written down."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lvspec.evaluation.journal import Journal
from lvspec.evaluation.methods import in_turns
from lvspec.evaluation.records import Record, merged, record_of
from lvspec.evaluation.samples import Sample
from lvspec.evaluation.ways import Way
from lvspec.phases.draft import DraftChoice
from lvspec.video.processor import HFProcessor, Processor


@dataclass(frozen=True)
class Models:
    """As `lvspec.evaluation.methods.Models`, with the draft's processor where it differs."""

    target: PreTrainedModel
    draft: DraftChoice
    processor: Processor | HFProcessor
    draft_processor: Processor | HFProcessor | None


@dataclass(frozen=True)
class _Prompt:
    inputs: Mapping[str, Tensor]
    draft_inputs: Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Run:
    """Samples to caption by methods.

    Attributes:
        models: Who captions.
        samples: What is to be captioned.
        ways: The methods by name.
        frames: Keyword arguments for processors.
    """

    models: Models
    samples: Sequence[Sample]
    ways: Mapping[str, Way]
    frames: Mapping[str, Any]

    def caption(self, journal: Journal, show_progress: bool | None) -> None:
        """What the journal does not have yet."""
        records = merged(journal.records)
        missing = [
            {name for name in self.ways if not _is_done(records.get((sample.id, name)), sample)}
            for sample in self.samples
        ]
        left = [index for index, names in enumerate(missing) if names]
        total = sum(map(len, missing))
        show = show_progress if total else False
        disable = None if show is None else not show  # None is tqdm's "only on a terminal"
        with tqdm(total=total, desc="warm-up", disable=disable, leave=False) as bar:
            readable: list[int] = []
            turns = in_turns(
                {name: way.method(self.models) for name, way in self.ways.items()} if left else {},
                self._prompts(left, missing, readable, journal, bar),
                is_wanted=lambda turn, name: name in missing[readable[turn]],
                errors=(Exception,),  # one method's failure is not the others'
            )
            for turn in turns:
                sample = self.samples[readable[turn.index]]
                journal.add(record_of(sample, turn.method, turn.output, turn.warm_up))
                bar.set_description("captions", refresh=False)
                bar.update()

    def _prompts(
        self,
        left: Sequence[int],
        missing: Sequence[set[str]],
        readable: list[int],
        journal: Journal,
        bar: tqdm,
    ) -> Iterator[_Prompt]:
        """Inputs of samples, one after the other; what cannot be read is written down as such."""
        for index in left:
            sample = self.samples[index]
            try:
                prompt = self._prompt(sample)
            except (OSError, ValueError) as error:
                for name in missing[index]:
                    journal.add(record_of(sample, name, error, None))
                    bar.update()
                continue
            readable.append(index)
            yield prompt

    def _prompt(self, sample: Sample) -> _Prompt:
        models = self.models
        given = {**self.frames, "device": models.target.device}
        inputs = models.processor(sample.video, sample.prompt, **given)
        if models.draft_processor is None:
            return _Prompt(inputs, None)
        # Read twice, because each keeps frames at its own size; what is wrong with them was said.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _Prompt(inputs, models.draft_processor(sample.video, sample.prompt, **given))


def _is_done(record: Record | None, sample: Sample) -> bool:
    return (
        record is not None
        and record["error"] is None
        and record["prompt"] == sample.prompt
        # Only the name: a path may be relative, to where the command was run the last time.
        and os.path.basename(record["video"]) == os.path.basename(sample.video)
    )
