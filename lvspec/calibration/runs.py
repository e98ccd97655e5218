"""Captions of clips by one way after the other; each is kept as soon as it is there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lvspec.calibration.candidates import STRICT, Candidate
from lvspec.config import DecodeConfig
from lvspec.engine.decoder import Decoder
from lvspec.engine.errors import NonFiniteLogits
from lvspec.evaluation.journal import Journal
from lvspec.evaluation.samples import Sample
from lvspec.models.model import Model
from lvspec.phases.defaults import eos_ids_of
from lvspec.phases.draft import DraftChoice

Prepare = Callable[[Sample], tuple[Mapping[str, Any], Mapping[str, Any] | None]]
"""A sample to the inputs of the target, and those of the draft where they are others."""
Record = dict[str, Any]

_DECODING = ("draft", "verify", "accept", "commit", "iteration")
"""Phases of which an iteration consists. What else a caption takes is the same for all ways, and
weighs the more the fewer iterations there are."""


@dataclass(frozen=True)
class Way:
    """How captions are made.

    Attributes:
        name: For a person.
        candidate: Settings; None: the target without a draft.
        trace: Whether every row is kept.
        beside: The way beside which the target is timed.
    """

    name: str
    candidate: Candidate | None = None
    trace: bool = False
    beside: Way | None = None

    @property
    def key(self) -> str:
        """What its captions are kept under."""
        if self.candidate is None:
            return f"alone beside {self.beside.key}" if self.beside else "alone"
        return f"{self.candidate.key}{' traced' if self.trace else ''}"

    @property
    def alone(self) -> Way:
        """The target without a draft, captioning in turns with this."""
        return Way("alone", beside=self)


@dataclass
class Runs:
    """Makes captions, or takes those that a journal has.

    Args:
        target, draft: Models.
        tokenizer: Of both.
        prepare: Reads videos.
        config: How to run, but for the length of chains.
        journal: What was done before, and where it goes.
        progress: Whether a bar shows it.

    Attributes:
        problems: Of samples that cannot be captioned, why; by id.
        made: How many captions were made, not found.
    """

    target: PreTrainedModel
    draft: DraftChoice
    tokenizer: PreTrainedTokenizerBase
    prepare: Prepare
    config: DecodeConfig
    journal: Journal
    progress: bool = True
    problems: dict[str, str] = field(default_factory=dict)
    made: int = 0
    _known: dict[tuple[str, str], Record] = field(default_factory=dict)
    _decoders: dict[bool, tuple[str, Decoder]] = field(default_factory=dict)
    _prepared: tuple[str, tuple[Any, Any]] | None = None

    def __post_init__(self) -> None:
        for record in self.journal.records:
            self._keep(record)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """With which captions end."""
        return eos_ids_of(Model(self.target, "target"), STRICT, self.config)

    def captions(
        self,
        way: Way,
        samples: Iterable[Sample],
        goes_on: Callable[[list[tuple[Sample, Record]]], bool] | None = None,
        timed: int = 0,
    ) -> list[tuple[Sample, Record]]:
        """Captions of those samples that can be captioned, in order.

        Args:
            way: How.
            samples: Which.
            goes_on: Asked after each caption whether there is a reason to make more.
            timed: How many of them the target captions alone, too, in turns, so that a slow spell
                of the machine falls on both: `alone_beside` has these.
        """
        samples = [sample for sample in samples if sample.id not in self.problems]
        found: list[tuple[Sample, Record]] = []
        # None: on a terminal only.
        bar = tqdm(samples, way.name, disable=None if self.progress else True, leave=False)
        with bar:
            for index, sample in enumerate(bar):
                if index < timed and (way.alone.key, sample.id) not in self._known:
                    self._caption(way.alone, sample)
                record = self._known.get((way.key, sample.id)) or self._caption(way, sample)
                if record is None:
                    continue
                found.append((sample, record))
                if goes_on is not None and not goes_on(found):
                    break
        return found

    def alone_beside(self, way: Way, samples: Iterable[Sample]) -> list[tuple[Sample, Record]]:
        """What the target said alone in turns with a way, of those of the samples that it did."""
        found = ((sample, self._known.get((way.alone.key, sample.id))) for sample in samples)
        return [(sample, record) for sample, record in found if record is not None]

    def _caption(self, way: Way, sample: Sample) -> Record | None:
        try:
            inputs, draft_inputs = self._inputs_of(sample)
        except (OSError, ValueError) as error:
            return self._add({"way": None, "id": sample.id, "error": str(error)})
        decoder, facts = self._decoder_of(way), {}
        if way.candidate is None:
            draft_inputs = None
        start, busy = time.perf_counter(), time.thread_time()
        try:
            generation = decoder.generate(inputs, draft_inputs=draft_inputs)
        except NonFiniteLogits as error:
            generation, facts = error.generation, {"error": str(error)}
        except ValueError as error:  # of this prompt: too long, for instance
            return self._add({"way": None, "id": sample.id, "error": str(error)})
        seconds, busy = time.perf_counter() - start, time.thread_time() - busy
        # What else a machine does only adds to it. A device is waited for, which is no work.
        share = min(busy / seconds, 1.0) if self.target.device.type == "cpu" else 1.0
        stats = generation.stats
        phases = stats.seconds
        once = phases["warm-up"] + phases["capture"]
        record = {
            "way": way.key,
            "id": sample.id,
            "error": None,
            "seconds": (seconds - once) * share,
            "prefill_s": phases["prefill"] * share,
            "decode_s": sum(phases[name] for name in _DECODING) * share,
            "iterations": stats.num_iterations,
            "emitted": stats.num_emitted - stats.num_warm_up_tokens,
            **generation.to_dict(),
            **facts,
        }
        return self._add(record)

    def _inputs_of(self, sample: Sample) -> tuple[Any, Any]:
        """Read once where the target alone takes its turn before a way."""
        if self._prepared is None or self._prepared[0] != sample.id:
            self._prepared = None  # two videos need not be in memory at a time
            self._prepared = sample.id, self.prepare(sample)
        return self._prepared[1]

    def _add(self, record: Record) -> Record | None:
        self.journal.add(record)
        self.made += 1
        return self._keep(self.journal.records[-1])

    def _keep(self, record: Record) -> Record | None:
        if record["way"] is None:
            self.problems[record["id"]] = record["error"]
            return None
        self._known[record["way"], record["id"]] = record
        return record

    def _decoder_of(self, way: Way) -> Decoder:
        """One with a draft and one without at a time, for their caches may be large."""
        candidate, config = way.candidate, replace(self.config, trace=way.trace)
        policy, drafts = None, candidate is not None
        if drafts:
            policy, config = candidate.policy, replace(config, gamma=candidate.gamma)
        key = way.key if drafts else "alone"
        if self._decoders.get(drafts, ("", None))[0] != key:
            self._decoders.pop(drafts, None)
            draft = self.draft if drafts else None
            decoder = Decoder(self.target, draft, policy, config, tokenizer=self.tokenizer)
            self._decoders[drafts] = key, decoder
        return self._decoders[drafts][1]


def rate(captions: Iterable[tuple[Sample, Record]]) -> float:
    """Tokens per second of decoding."""
    records = [record for _, record in captions]
    return sum(r["emitted"] for r in records) / max(sum(r["decode_s"] for r in records), 1e-12)


def tau(captions: Iterable[tuple[Sample, Record]]) -> float:
    """Tokens per pass of the target."""
    records = [record for _, record in captions]
    emitted = sum(len(record["tokens"]) - 1 for record in records)
    passes = sum(record["iterations"] for record in records)
    return emitted / passes if passes else math.nan


def regret_per_token(captions: Iterable[tuple[Sample, Record]]) -> float:
    """Nats."""
    records = [record for _, record in captions]
    tokens = sum(len(record["tokens"]) for record in records)
    return sum(record["stats"]["regret"] for record in records) / max(tokens, 1)
