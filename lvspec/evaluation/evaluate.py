"""evaluate: every sample by every method, in turns, written down as it goes, and one row each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lvspec.checks import check_type
from lvspec.config import DecodeConfig
from lvspec.environment import environment, made_folder, write_json
from lvspec.evaluation.intervals import CONFIDENCE, check_confidence
from lvspec.evaluation.journal import Journal
from lvspec.evaluation.judge import Judge
from lvspec.evaluation.methods import EvaluationInterrupted
from lvspec.evaluation.metrics import check_installed, find_metric
from lvspec.evaluation.records import Record, merged
from lvspec.evaluation.running import Models, Run
from lvspec.evaluation.samples import Problem, Sample, Samples, read_manifest, samples_of
from lvspec.evaluation.scoring import judged, scored
from lvspec.evaluation.summary import summaries
from lvspec.evaluation.ways import AUTOREGRESSION, HF, Way, ways
from lvspec.phases.draft import DraftChoice
from lvspec.policy import AcceptancePolicy
from lvspec.profile import Profile, identity
from lvspec.video.processor import HFProcessor, Processor

RECORDS, SUMMARY = "records.jsonl", "summary.json"
KIND = "evaluation"
_OWN = (AUTOREGRESSION, HF, "strict")
"""Methods that say what the target says by itself, the first that there is."""


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
    profile: str | os.PathLike | Mapping[str, Any] | Profile | None = None,
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
        profile: What `lvspec calibrate` found for this pair, in place of `policy`: the method
            `lvspec` has its policy, and drafts as it says.
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
    is_path = isinstance(samples, (str, os.PathLike))
    asked = read_manifest(samples) if is_path else samples_of(samples)
    if not asked.samples:
        raise ValueError(
            f"samples: expected at least one, got none ({len(asked.problems)} with problems)"
        )
    models = Models(target, draft, processor, draft_processor)
    if isinstance(methods, Mapping):
        chosen = dict(methods)
    else:
        lvspec = _lvspec(config, policy, profile, models)
        chosen = ways(methods, config=config, lvspec=lvspec)
    for name, way in chosen.items():
        check_type(f"methods[{name!r}]", way, Way)
    same = draft_processor is None
    left_out = {n: why for n, w in chosen.items() if (why := w.obstacle(models, same_inputs=same))}
    chosen = {name: way for name, way in chosen.items() if name not in left_out}
    if not chosen:
        raise ValueError(f"methods: expected one that these models can do, got {left_out}")
    reference = next((name for name in _OWN if name in chosen), None)
    folder = made_folder(out)
    frames = {"num_frames": num_frames, "fps": fps}
    settings = _settings(models, chosen, frames)
    notes: list[str] = []
    run = Run(models, asked.samples, chosen, frames)

    def evaluation() -> Evaluation:
        records = merged(journal.records)
        rows = summaries(list(chosen), records, asked.samples, reference, confidence)
        done = Evaluation(
            *(rows, records, asked.samples, asked.problems, left_out, reference, notes, folder)
        )
        write_json(folder / SUMMARY, _document(done, settings, confidence, judge), name="out")
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


def _lvspec(
    config: DecodeConfig | None,
    policy: AcceptancePolicy | None,
    profile: str | os.PathLike | Mapping[str, Any] | Profile | None,
    models: Models,
) -> Way:
    """What the method `lvspec` stands for."""
    config = DecodeConfig() if config is None else config
    if profile is None:
        return Way(AcceptancePolicy.lvspec() if policy is None else policy, config)
    if policy is not None:
        raise ValueError(f"policy, profile: expected one of them, got both ({policy.name})")
    found = Profile.read(profile)
    found.check(models.target, models.draft)
    given = {**found.config, "max_new_tokens": config.max_new_tokens}
    return Way(AcceptancePolicy.from_dict(found.policy), replace(config, **given))


def _settings(
    models: Models, chosen: Mapping[str, Way], frames: Mapping[str, Any]
) -> dict[str, Any]:
    """What captions and their times depend on."""
    target = models.target
    return {
        "target": identity(target),
        "draft": identity(models.draft),
        "methods": {name: way.to_dict() for name, way in chosen.items()},
        "frames": dict(frames),
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": environment(target.device)["device_name"],
        "threads": torch.get_num_threads(),
    }


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
