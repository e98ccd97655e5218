"""calibrate: the fastest settings that keep a stated fidelity on a user's own clips."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lvspec.calibration.arguments import checked, drafting, metric_for, ordered
from lvspec.calibration.candidates import OWN, STRICT, USUAL, WIDEST, Candidate
from lvspec.calibration.certificate import COMPARED, Certifier, Measurement
from lvspec.calibration.contexts import contexts_of
from lvspec.calibration.fidelity import ANCHORS, Fidelity
from lvspec.calibration.runs import Record, Runs, Way, rate
from lvspec.calibration.search import Prediction, Search, lengths
from lvspec.calibration.timing import Captions, Pace
from lvspec.checks import token_ids
from lvspec.config import DecodeConfig
from lvspec.environment import environment
from lvspec.evaluation.journal import Journal
from lvspec.evaluation.samples import Sample
from lvspec.phases.draft import DraftChoice
from lvspec.policy import AcceptancePolicy
from lvspec.profile import Profile, identity
from lvspec.video.processor import HFProcessor, Processor

FIDELITY, CONFIDENCE = 0.998, 0.95
CHOOSING = 40
"""Clips that settings are chosen by, at most; of fewer than twice as many, half of them."""
TIMED = 8
"""Clips on which chains are timed beside the target alone."""
JOURNAL = "captions.jsonl"

_log = logging.getLogger("lvspec.calibration")


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        profile: To be written, and read by `AcceptancePolicy.from_profile`.
        is_certified: Whether its settings are more than strict, and keep the stated fidelity with
            the stated confidence. If not, the profile is strict, which keeps everything.
        reason: Why not, in words; empty if they do.
        strict: What strict settings do, as measured.
        predictions: Of the candidates, the safest first, and before them of strict.
        measurements: Of those that were run, in this order.
        problems: Of samples that could not be captioned, why; by id.
        made: Captions that this call made; the others were there.
    """

    profile: Profile
    is_certified: bool
    reason: str
    strict: Measurement
    predictions: list[Prediction]
    measurements: list[Measurement]
    problems: dict[str, str] = field(default_factory=dict)
    made: int = 0

    def rows(self) -> list[dict[str, Any]]:
        """A row for each candidate: `settings` in words, `predicted`, `measured` (or None)."""
        measured = {each.candidate.key: each for each in (self.strict, *self.measurements)}
        rows = []
        for each in self.predictions:
            found = measured.get(each.candidate.key)
            rows.append(
                {
                    "settings": each.candidate.describe(),
                    **each.candidate.settings(),
                    "predicted": each.to_dict(),
                    "measured": None if found is None else found.to_dict(),
                }
            )
        return rows


def calibrate(
    target: PreTrainedModel,
    draft: DraftChoice,
    samples: Iterable[Sample],
    *,
    processor: Processor | HFProcessor,
    draft_processor: Processor | HFProcessor | None = None,
    fidelity: float = FIDELITY,
    confidence: float = CONFIDENCE,
    metric: str | None = None,
    clips: int | None = None,
    config: DecodeConfig | None = None,
    strict_ids: Iterable[int] = (),
    num_frames: int | None = None,
    fps: float | None = None,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> Calibration:
    """Find the fastest settings that keep a stated fidelity, on a user's own clips.

    Half of the clips (40 at most) are captioned by the target and by the loosest policy, with
    everything that was drafted kept. Replayed over these rows, many policies and lengths of chains
    are compared, and a few of them are run on the other clips, the safest first, up to the first
    that does not show the stated fidelity. The fastest that does is the result.

    Args:
        target: HF model of a supported family.
        draft: A smaller model with the same tokenizer, or "self".
        samples: Clips, drawn like those to come. Which choose and which certify is decided by their
            ids.
        processor: Turns a video and a prompt into the target's inputs.
        draft_processor: Into the draft's; None: they are the target's.
        fidelity: How much of the target's own is to be kept, in (0, 1).
        confidence: With which, in (0, 1).
        metric: What fidelity is measured by: "anchors", the share of what the video decides in the
            target's own caption that another keeps; a name of `lvspec.evaluation.metrics.METRICS`;
            or the user's own function, `module:name`. Those whose names begin with `own_` compare
            with the target's own caption; all others score both, and fidelity is the mean score
            relative to that of the target's own. None: "own_choice" where all samples are multiple
            choice, else "anchors".
        clips: How many samples are used at most; None: all.
        config: How to run. Greedy, in chains; `gamma="auto"` tries several lengths.
        strict_ids: Tokens that are never part of a mismatch.
        num_frames, fps: As a processor takes them.
        folder: Where captions are kept, so that an interrupted call goes on; None: nowhere.
        progress: Whether a bar on a terminal shows it.

    Returns:
        The profile and what is known of every candidate.

    Raises:
        ImportError: A metric needs what is not installed.
        OSError: The folder cannot be written.
        TypeError, ValueError: An argument is wrong; or the folder was begun with other settings, of
            which the first is named; or fewer than two clips can be captioned.
    """
    samples = ordered(samples, clips)
    config = checked(config, draft)
    asked = Fidelity(metric or metric_for(samples), fidelity, confidence)
    base = AcceptancePolicy(strict_ids=token_ids("strict_ids", tuple(strict_ids)))

    def prepare(sample: Sample) -> tuple[Any, Any]:
        given = {"num_frames": num_frames, "fps": fps, "device": target.device}
        inputs = processor(sample.video, sample.prompt, **given)
        if draft_processor is None or isinstance(draft, str):
            return inputs, None
        return inputs, draft_processor(sample.video, sample.prompt, **given)

    settings = {
        "target": identity(target),
        "draft": identity(draft),
        "dtype": str(target.dtype),
        "device": str(target.device),
        "fidelity": fidelity,
        "confidence": confidence,
        "metric": asked.metric,
        "samples": [[sample.id, sample.prompt] for sample in samples],
        "num_frames": num_frames,
        "fps": fps,
        "strict_ids": base.strict_ids,
        "config": asdict(config),
    }
    with ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        Path(folder).mkdir(parents=True, exist_ok=True)
        journal = stack.enter_context(Journal(Path(folder) / JOURNAL, "calibration", settings))
        if journal.records:
            _log.info("goes on: %d captions are there", len(journal.records))
        runs = Runs(target, draft, processor.tokenizer, prepare, config, journal, progress)
        return Calibrating(runs, samples, asked, base, settings).run()


class Calibrating:
    """The steps, each by what the one before found.

    Args:
        runs: Makes the captions.
        samples: Clips, in an order that has nothing to do with what is in them.
        fidelity: What is asked for.
        base: Whose guarded ids all policies have.
        pair: `identity` of "target" and "draft".
    """

    def __init__(
        self,
        runs: Runs,
        samples: Sequence[Sample],
        fidelity: Fidelity,
        base: AcceptancePolicy,
        pair: Mapping[str, Any],
    ) -> None:
        self.runs, self.fidelity, self.base, self.pair = runs, fidelity, base, pair
        count = min(len(samples) // 2, CHOOSING)
        self.choosing, self.certifying = samples[:count], samples[count:]
        self.lengths = lengths(runs.config.gamma, runs.config.max_new_tokens)
        self.own_policy = replace(OWN, strict_ids=base.strict_ids)

    def run(self) -> Calibration:
        """All of them."""
        if len(self.certifying) < self.fidelity.needed:
            _log.info("%s", self._too_few(len(self.certifying)))
        own = self._recorded("own, recorded", self.own_policy)
        search = self._search(own)
        strict = search.best_length(self.own_policy)
        relevance = [value for _, record in own for value in record["relevance"] if value]
        front = search.front(self.base, relevance)
        chosen = search.sequence([p for p in front if p.decode_speedup > strict.decode_speedup])
        _log.info("%d settings are compared by replay, %d are run", len(front), len(chosen))
        way = Way("own", strict.candidate)
        own = self.runs.captions(way, self.certifying, timed=COMPARED)
        if not own:
            raise ValueError(
                "samples: expected at least two clips that can be captioned, got "
                f"{len(self.certifying)} to certify with, each with a problem"
            )
        alone = self.runs.alone_beside(way, self.certifying)
        certifier = Certifier(self.runs, own, self.fidelity, _beside(self.fidelity))
        measured = certifier.sequence(
            [each.candidate for each in chosen], to_the_end=len(own) < self.fidelity.needed
        )
        return self._result(
            certifier.measure(strict.candidate), measured, [strict, *front], len(own), rate(alone)
        )

    def _recorded(self, name: str, policy: AcceptancePolicy) -> Captions:
        candidate = Candidate(policy, self.lengths[-1])
        return self.runs.captions(Way(name, candidate, trace=True), self.choosing)

    def _search(self, own: Captions) -> Search:
        """With everything recorded of the clips that choose."""
        loose: dict[str, list[Record]] = {}
        for policy in (USUAL, WIDEST):
            policy = replace(policy, strict_ids=self.base.strict_ids)
            for sample, record in self._recorded(f"{policy.name}, recorded", policy):
                loose.setdefault(sample.id, []).append(record)
        clips = [(sample, record) for sample, record in own if record["iterations"]]
        if not clips:
            raise ValueError(
                "samples: expected at least two clips that can be captioned, got "
                f"{len(self.choosing)} to choose by, each with a problem"
                + "".join(f"; {name}: {why}" for name, why in list(self.runs.problems.items())[:1])
            )
        contexts = [contexts_of([record, *loose.get(sample.id, [])]) for sample, record in clips]
        return Search(
            clips,
            contexts,
            self._pace([sample for sample, _ in clips[:TIMED]]),
            self.fidelity,
            gammas=self.lengths,
            decode=self._decode,
            eos_ids=self.runs.eos_ids,
            max_new_tokens=self.runs.config.max_new_tokens,
        )

    def _pace(self, samples: Sequence[Sample]) -> Pace:
        """Of the shortest chains, the longest and those in the middle."""
        lengths, timed = self.lengths, {}
        for gamma in {lengths[0], lengths[len(lengths) // 2], lengths[-1]}:
            way = Way(f"own, {gamma}", Candidate(self.own_policy, gamma))
            captions = self.runs.captions(way, samples, timed=len(samples))
            timed[gamma] = captions, self.runs.alone_beside(way, samples)
        return Pace.of(timed)

    def _decode(self, tokens: list[int]) -> str:
        return self.runs.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _result(
        self,
        strict: Measurement,
        measured: list[Measurement],
        predictions: list[Prediction],
        clips: int,
        alone_rate: float,
    ) -> Calibration:
        kept = [each for each in measured if each.holds]
        best = max(kept, key=lambda each: each.decode_speedup, default=None)
        is_faster = best is not None and best.decode_speedup > strict.decode_speedup
        reason = ""
        if not is_faster:
            if clips < self.fidelity.needed:
                reason = self._too_few(clips)
            elif kept or not measured:
                reason = "candidates: expected one that is faster than strict, got none"
            else:
                reason = self._failed(measured)
            best = None
            warnings.warn(f"lvspec: {reason}; the profile is strict", UserWarning, stacklevel=4)
        chosen = strict if best is None else best
        policy = chosen.candidate.policy
        if best is None:
            policy = replace(STRICT, strict_ids=self.base.strict_ids)
        predicted = next(p for p in predictions if p.candidate.key == chosen.candidate.key)
        used = (*self.choosing, *self.certifying)
        profile = Profile(
            self.pair["target"],
            self.pair["draft"],
            policy.to_dict(),
            {"gamma": chosen.candidate.gamma, **drafting(self.runs.config)},
            {
                "metric": self.fidelity.metric,
                "stated": self.fidelity.wanted,
                "confidence": self.fidelity.confidence,
                "certified": best is not None,
                "reason": reason,
                "clips": chosen.clips,
                "clips_needed": self.fidelity.needed,
                "measured": chosen.fidelity,
                "lower_bound": chosen.lower_bound,
            },
            tuple(sample.id for sample in used if sample.id not in self.runs.problems),
            {
                "predicted": predicted.to_dict(),
                "measured": chosen.to_dict(),
                "strict": strict.to_dict(),
                "alone_tokens_per_s": alone_rate,
            },
            environment(self.runs.target.device),
        )
        return Calibration(
            *(profile, best is not None, reason, strict, predictions, measured),
            problems=dict(self.runs.problems),
            made=self.runs.made,
        )

    def _too_few(self, clips: int) -> str:
        asked, most = self.fidelity, 0.0
        if clips:
            most = asked.lower_bound([asked.perfect] * clips)
        return (
            f"fidelity: expected {asked.needed} clips or more to certify {asked.wanted:g} with "
            f"confidence {asked.confidence:g}, got {clips} (beside {len(self.choosing)} to choose "
            f"by), which certify {most:.3f} at most"
        )

    def _failed(self, measured: Sequence[Measurement]) -> str:
        first = measured[0]
        return (
            f"fidelity: expected {self.fidelity.wanted:g} with confidence "
            f"{self.fidelity.confidence:g}, got {first.fidelity:.4f} on {first.clips} clips by the "
            "safest of the candidates"
        )


def _beside(fidelity: Fidelity) -> list[Fidelity]:
    """Other metrics, where their libraries are there."""
    found = [ANCHORS, "own_same"]
    for name, module in (("own_chrf", "sacrebleu"), ("own_rouge_l", "rouge_score")):
        if importlib.util.find_spec(module) is not None:
            found.append(name)
    return [replace(fidelity, metric=name) for name in found if name != fidelity.metric]
