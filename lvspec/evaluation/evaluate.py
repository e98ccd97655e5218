"""evaluate: every sample by every method, in turns, written down as it goes, and one row each."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lvspec.checks import check_type
from lvspec.config import DecodeConfig
from lvspec.engine.errors import NonFiniteLogits
from lvspec.environment import environment, write_json
from lvspec.evaluation.intervals import CONFIDENCE, check_confidence
from lvspec.evaluation.journal import Journal
from lvspec.evaluation.judge import Judge
from lvspec.evaluation.methods import EvaluationInterrupted, in_turns
from lvspec.evaluation.metrics import check_installed, find_metric
from lvspec.evaluation.records import Record, merged, record_of
from lvspec.evaluation.samples import Problem, Sample, Samples, read_manifest
from lvspec.evaluation.scoring import judged, scored
from lvspec.evaluation.summary import summary
from lvspec.evaluation.ways import AUTOREGRESSION, HF, Way, ways
from lvspec.phases.draft import DraftChoice
from lvspec.policy import AcceptancePolicy
from lvspec.profile import identity
from lvspec.video.processor import HFProcessor, Processor

RECORDS, SUMMARY = "records.jsonl", "summary.json"
KIND = "evaluation"
_OWN = (AUTOREGRESSION, HF, "strict")
"""Methods that say what the target says by itself, the first that there is."""
_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError, NonFiniteLogits)
"""What ends a caption and not the run; memory that ran out is a RuntimeError of torch's."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        rows: One a method, see `lvspec.evaluation.summary.summary`.
        records: The captions by (sample, method), see `lvspec.evaluation.records.record_of`.
        samples: What was asked for.
        problems: Lines of a manifest, or rows of a data set, that are no samples.
        left_out: Methods that these models cannot do, and why.
        reference: The method whose captions are the target's own; None: there is none.
        notes: What else to know: captions that no judge judged, for instance.
        folder: Where `records.jsonl` and `summary.json` are.
    """

    rows: list[dict[str, Any]]
    records: dict[tuple[str, str], Record]
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    left_out: dict[str, str]
    reference: str | None
    notes: list[str]
    folder: Path

    @property
    def is_complete(self) -> bool:
        """Whether every sample has a caption by every method, and nothing was wrong with any."""
        wanted = len(self.samples) * len(self.rows)
        captions = sum(row["captions"] for row in self.rows)
        return captions == wanted and not (self.problems or self.notes)


@dataclass(frozen=True)
class _Models:
    """As `lvspec.evaluation.methods.Models`, with the draft's processor where it differs."""

    target: PreTrainedModel
    draft: DraftChoice
    processor: Processor | HFProcessor
    draft_processor: Processor | HFProcessor | None


@dataclass(frozen=True)
class _Prompt:
    inputs: Mapping[str, Tensor]
    draft_inputs: Mapping[str, Tensor] | None


def evaluate(
    target: PreTrainedModel,
    draft: DraftChoice,
    samples: str | os.PathLike | Samples | Iterable[Sample],
    *,
    processor: Processor | HFProcessor,
    draft_processor: Processor | HFProcessor | None = None,
    out: str | os.PathLike,
    methods: Sequence[str] | Mapping[str, Way] | None = None,
    config: DecodeConfig | None = None,
    policy: AcceptancePolicy | None = None,
    metrics: Sequence[str] = (),
    judge: Judge | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    confidence: float = CONFIDENCE,
    show_progress: bool | None = None,
) -> Evaluation:
    """Caption samples by several methods side by side, and compare them.

    The methods take turns on each sample, in an order that rotates, after a caption each that does
    not count. What was captioned stands in `out` at once: the same call goes on after any
    interruption, does again what failed, and does what is new in the samples. A folder of other
    models, methods or settings is refused.

    Args:
        target, draft: As for `lvspec.generate`.
        samples: Samples, or the path of a `manifest.jsonl`, see
            `lvspec.evaluation.samples.read_manifest`.
        processor: The target's.
        draft_processor: The draft's, where it prepares a video in another way.
        out: A folder, which is made: `records.jsonl` has one caption a line, `summary.json` what
            is returned here but for the captions.
        methods: Names of `lvspec.evaluation.ways.NAMES`, or methods of one's own by name; None: all
            of `NAMES`. What these models cannot do is left out, and `left_out` says why.
        config: How drafts are made, and how many tokens there are at most; greedy.
        policy: What the method `lvspec` stands for; None: `AcceptancePolicy.lvspec()`.
        metrics: A user's own, by `module:name`, see `lvspec.evaluation.metrics.find_metric`; those
            of `METRICS` that apply are there anyway.
        judge: Asked about every caption that it has not judged; None: nobody is.
        num_frames, fps: As for a processor.
        confidence: Of all intervals.
        show_progress: Whether there is a bar; None: on a terminal.

    Returns:
        What was found; samples whose video cannot be read, and captions that failed, are counted
        in the rows.

    Raises:
        ImportError: A metric needs what is not installed.
        OSError: The manifest cannot be read, or `out` not written.
        ValueError: An argument is wrong; there is no sample; or `out` is of other settings, the
            first of which is named.
        EvaluationInterrupted: Ctrl-C; `results` is the `Evaluation` so far.
    """
    check_confidence(confidence)
    check_installed()
    for name in metrics:
        find_metric(name)
    asked = _samples(samples)
    if not asked.samples:
        raise ValueError(
            f"samples: expected at least one, got none ({len(asked.problems)} with problems)"
        )
    models = _Models(target, draft, processor, draft_processor)
    own = isinstance(methods, Mapping)
    chosen = dict(methods) if own else ways(methods, config=config, policy=policy)
    for name, way in chosen.items():
        check_type(f"methods[{name!r}]", way, Way)
    same = draft_processor is None
    left_out = {n: why for n, w in chosen.items() if (why := w.obstacle(models, same_inputs=same))}
    chosen = {name: way for name, way in chosen.items() if name not in left_out}
    if not chosen:
        raise ValueError(f"methods: expected one that these models can do, got {left_out}")
    reference = next((name for name in _OWN if name in chosen), None)
    folder = _folder(out)
    settings = {
        "target": identity(target),
        "draft": identity(draft),
        "methods": {name: way.to_dict() for name, way in chosen.items()},
        "frames": {"num_frames": num_frames, "fps": fps},
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": environment(target.device)["device_name"],
        "threads": torch.get_num_threads(),
    }
    notes: list[str] = []
    run = _Run(models, asked.samples, chosen, {"num_frames": num_frames, "fps": fps})

    def evaluation() -> Evaluation:
        records = merged(journal.records)
        categories = {sample.id: sample.category for sample in asked.samples}
        ids = [sample.id for sample in asked.samples]
        rows = [
            summary(
                name,
                records,
                ids,
                reference=reference,
                categories=categories,
                confidence=confidence,
            )
            for name in chosen
        ]
        done = Evaluation(
            *(rows, records, asked.samples, asked.problems, left_out, reference, notes, folder)
        )
        write_json(folder / SUMMARY, _document(done, settings, confidence, judge))
        return done

    with Journal(folder / RECORDS, KIND, settings) as journal:
        try:
            run.caption(journal, show_progress)
            if judge is not None:
                notes += judged(judge, asked.samples, journal, show_progress)
        except KeyboardInterrupt:
            notes += scored(asked.samples, journal, metrics, reference)
            raise EvaluationInterrupted(evaluation()) from None
        notes += scored(asked.samples, journal, metrics, reference)
        return evaluation()


@dataclass(frozen=True)
class _Run:
    models: _Models
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
        disable = None if show_progress is None else not show_progress
        with tqdm(total=total, desc="captions", disable=disable or not total, leave=False) as bar:
            readable: list[int] = []
            turns = in_turns(
                {name: way.method(self.models) for name, way in self.ways.items()} if left else {},
                self._prompts(left, missing, readable, journal, bar),
                is_wanted=lambda turn, name: name in missing[readable[turn]],
                errors=_ERRORS,
            )
            for turn in turns:
                sample = self.samples[readable[turn.index]]
                journal.add(record_of(sample, turn.method, turn.output, turn.warm_up))
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
        and (record["video"], record["prompt"]) == (sample.video, sample.prompt)
    )


def _samples(given: str | os.PathLike | Samples | Iterable[Sample]) -> Samples:
    if isinstance(given, (str, os.PathLike)):
        return read_manifest(given)
    return given if isinstance(given, Samples) else Samples(tuple(given))


def _folder(out: str | os.PathLike) -> Path:
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = "a file" if Path(out).is_file() else error.strerror
        raise type(error)(f"out: expected a folder, got {os.fspath(out)}: {got}") from error
    return Path(out)


def _document(
    done: Evaluation, settings: Mapping[str, Any], confidence: float, judge: Judge | None
) -> dict[str, Any]:
    return {
        "lvspec": "evaluation summary",
        "version": 1,
        "rows": done.rows,
        "samples": len(done.samples),
        "reference": done.reference,
        "confidence": confidence,
        "judge": None if judge is None else judge.model,
        "problems": [str(problem) for problem in done.problems],
        "left_out": done.left_out,
        "notes": done.notes,
        "settings": settings,
        "environment": environment(),
    }
