"""Does a calibrated profile keep what it states, and is it as fast as was predicted?

    python bench/calibration.py [--pair embedded] [--folder calibration] [--json FILE]
        [--pool 200] [--clips 100] [--unseen 40] [--repetitions 20] [--fidelity 0.9]

Each repetition calibrates on other clips, drawn from a pool, and applies the profile to clips of
another pool, which no calibration has seen. Captions that several repetitions ask for are made
once, and all are kept in `--folder`: the same command goes on.
"""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from measuring import script
from pairs import trained

from lvspec.calibration.calibrate import Calibrating
from lvspec.calibration.candidates import Candidate
from lvspec.calibration.fidelity import ANCHORS, Fidelity
from lvspec.calibration.runs import Runs, Way, tau
from lvspec.calibration.timing import measured_speedups
from lvspec.config import DecodeConfig
from lvspec.evaluation.journal import Journal
from lvspec.evaluation.samples import Sample, read_manifest
from lvspec.policy import AcceptancePolicy
from lvspec.profile import identity
from lvspec.shapes.evaluation import MAX_NEW_TOKENS

TIMED = 12
"""Unseen clips that the target captions alone too."""


class Remembering:
    """A processor that reads every video once."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.tokenizer, self._known = processor, processor.tokenizer, {}

    def __call__(self, sample: Sample) -> tuple[Any, None]:
        if sample.id not in self._known:
            self._known[sample.id] = self.processor(sample.video, sample.prompt)
        return self._known[sample.id], None


def main() -> int:
    parser = trained.parser_of(__doc__, clips=100)
    trained.add_pair(parser)
    parser.add_argument("--folder", type=Path, default=Path("calibration"))
    parser.add_argument("--pool", type=int, default=200, help="clips to draw from, of each split")
    parser.add_argument("--unseen", type=int, default=40, help="clips a profile is applied to")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--fidelity", type=float, default=0.9)
    parser.add_argument("--confidence", type=float, default=0.95)
    arguments, setup = trained.begin(parser)
    pools = {
        split: _pool(setup, split, arguments.pool, arguments.folder / split)
        for split in ("calibration", "evaluation")
    }
    target, draft = setup.pair.target, setup.pair.draft
    models = {"target": identity(target), "draft": identity(draft)}
    fidelity = Fidelity(ANCHORS, arguments.fidelity, arguments.confidence)
    config = DecodeConfig(max_new_tokens=MAX_NEW_TOKENS)
    read = Remembering(setup.pair.processor)
    rows = []
    with Journal(arguments.folder / "captions.jsonl", "bench", models) as journal:
        runs = Runs(target, draft, read.tokenizer, read, config, journal, progress=False)
        for repetition in range(arguments.repetitions):
            draw = random.Random(repetition)
            seen = draw.sample(pools["calibration"], arguments.clips)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = Calibrating(runs, seen, fidelity, AcceptancePolicy(), models).run()
            unseen = draw.sample(pools["evaluation"], arguments.unseen)
            rows.append(_applied(found, runs, unseen, fidelity, setup.task.read))
            print(repetition, rows[-1], flush=True)
    summary = _summary(rows, fidelity.wanted)
    script.print_table(
        ("repetitions", "certified", "kept", "tau within 10 %", "speed-up within 10 %"),
        [[str(summary[name]) for name in summary]],
    )
    facts = {name: getattr(arguments, name) for name in ("pool", "clips", "unseen", "fidelity")}
    facts |= {"pair": setup.name, "confidence": fidelity.confidence, "needed": fidelity.needed}
    script.finish(arguments, {**facts, "summary": summary, "rows": rows})
    return 0


def _pool(setup: trained.Trained, split: str, count: int, folder: Path) -> list[Sample]:
    """Clips of a split as files with a manifest, made where there is none."""
    manifest = folder / "manifest.jsonl"
    if not manifest.exists():
        clips = setup.task.make_clips(setup.pair, split, count, folder)
        lines = [json.dumps({"video": c.path.name, "prompt": c.prompt}) for c in clips]
        manifest.write_text("\n".join(lines) + "\n")
    return list(read_manifest(manifest).samples[:count])


def _applied(
    found: Any, runs: Runs, unseen: list[Sample], fidelity: Fidelity, read: Any
) -> dict[str, Any]:
    """A profile on clips that had no part in it."""
    profile = found.profile
    policy = AcceptancePolicy.from_profile(profile)
    own_policy = dataclasses.replace(found.strict.candidate.policy)
    own = dict(
        (sample.id, record)
        for sample, record in runs.captions(
            Way("own", Candidate(own_policy, found.strict.candidate.gamma)), unseen
        )
    )
    way = Way("profile", Candidate(policy, profile.config["gamma"]))
    captions = runs.captions(way, unseen, timed=TIMED)
    scores = [fidelity.score(sample, record, own[sample.id]) for sample, record in captions]
    decode, whole = measured_speedups(captions, runs.alone_beside(way, unseen))
    alike = total = 0
    for sample, record in captions:
        stated, expected = read(record["text"]), read(own[sample.id]["text"])
        alike += sum(stated.get(name) == value for name, value in expected.items())
        total += len(expected)
    predicted = profile.figures["predicted"]
    return {
        "certified": found.is_certified,
        "settings": way.candidate.describe(),
        "gamma": profile.config["gamma"],
        "lower_bound": profile.fidelity["lower_bound"],
        "fidelity": fidelity.value(scores),
        "attributes_alike": alike / total,
        "tau": {"predicted": predicted["tau"], "measured": tau(captions)},
        "decode_speedup": {"predicted": predicted["decode_speedup"], "measured": decode},
        "speedup": {"predicted": predicted["speedup"], "measured": whole},
    }


def _summary(rows: list[dict[str, Any]], wanted: float) -> dict[str, Any]:
    def within(name: str) -> int:
        pairs = [(row[name]["predicted"], row[name]["measured"]) for row in rows]
        return int(sum(abs(np.array([p / m - 1 for p, m in pairs])) <= 0.1))

    return {
        "repetitions": len(rows),
        "certified": sum(row["certified"] for row in rows),
        "kept": sum(row["fidelity"] >= wanted for row in rows),
        "tau": within("tau"),
        "decode_speedup": within("decode_speedup"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
