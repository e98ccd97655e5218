"""Does a calibrated profile keep what it states, and is it as fast as was predicted?

    python bench/calibration.py [--pair embedded] [--folder calibration] [--json FILE]
        [--calibrations 2] [--clips 100] [--sets 10] [--unseen 30] [--fidelity 0.9]

Each calibration has clips of its own, and its profile is applied to sets of clips of another split,
no two of which have a clip in common. All captions are kept in `--folder`: the same command goes
on.
"""

from __future__ import annotations

import json
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

TIMED = 6
"""Clips of a set that the target captions alone too."""


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
    parser.add_argument("--calibrations", type=int, default=2)
    parser.add_argument("--sets", type=int, default=10, help="of unseen clips")
    parser.add_argument("--unseen", type=int, default=30, help="clips of each set")
    parser.add_argument("--fidelity", type=float, default=0.9)
    parser.add_argument("--confidence", type=float, default=0.95)
    arguments, setup = trained.begin(parser)
    sizes = arguments.calibrations * arguments.clips, arguments.sets * arguments.unseen
    pools = [
        _pool(setup, split, count, arguments.folder / split)
        for split, count in zip(("calibration", "evaluation"), sizes, strict=True)
    ]
    target, draft = setup.pair.target, setup.pair.draft
    models = {"target": identity(target), "draft": identity(draft)}
    fidelity = Fidelity(ANCHORS, arguments.fidelity, arguments.confidence)
    config = DecodeConfig(max_new_tokens=MAX_NEW_TOKENS)
    read = Remembering(setup.pair.processor)
    rows: list[dict[str, Any]] = []
    tables, together = [], []
    with Journal(arguments.folder / "captions.jsonl", "bench", models) as journal:
        runs = Runs(target, draft, read.tokenizer, read, config, journal, progress=False)
        for seen in _parts(pools[0], arguments.clips):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = Calibrating(runs, seen, fidelity, AcceptancePolicy(), models).run()
            tables.append(found.rows())
            for unseen in _parts(pools[1], arguments.unseen):
                rows.append(_applied(found, runs, unseen, fidelity, setup.task.read))
                print(rows[-1], flush=True)
            together.append(_applied(found, runs, pools[1], fidelity, setup.task.read, timed=0))
    summary = _summary(rows, fidelity.wanted)
    script.print_table(
        ("settings", "gamma", "fidelity", "alike", "tau", "decoding", "captions"),
        [
            [
                row["settings"],
                str(row["gamma"]),
                f"{row['fidelity']:.3f} >= {row['lower_bound']:.3f}",
                f"{row['attributes_alike']:.1%}",
                *(
                    f"{row[name]['predicted']:.2f} / {row[name]['measured']:.2f}"
                    for name in ("tau", "decode_speedup", "speedup")
                ),
            ]
            for row in together
        ],
        title="predicted / measured, on all unseen clips",
    )
    script.print_table(
        ("sets", "certified", "kept", "tau within 10 %", "speed-up within 10 %"),
        [[str(summary[name]) for name in summary]],
    )
    names = ("calibrations", "clips", "sets", "unseen", "fidelity")
    facts = {name: getattr(arguments, name) for name in names}
    facts |= {"pair": setup.name, "confidence": fidelity.confidence, "needed": fidelity.needed}
    script.finish(
        arguments,
        {**facts, "summary": summary, "together": together, "rows": rows, "calibrated": tables},
    )
    return 0


def _pool(setup: trained.Trained, split: str, count: int, folder: Path) -> list[Sample]:
    """Clips of a split as files with a manifest, made where there is none."""
    manifest = folder / "manifest.jsonl"
    if not manifest.exists():
        clips = setup.task.make_clips(setup.pair, split, count, folder)
        lines = [json.dumps({"video": c.path.name, "prompt": c.prompt}) for c in clips]
        manifest.write_text("\n".join(lines) + "\n")
    return list(read_manifest(manifest).samples[:count])


def _parts(samples: list[Sample], size: int) -> list[list[Sample]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _applied(
    found: Any,
    runs: Runs,
    unseen: list[Sample],
    fidelity: Fidelity,
    read: Any,
    timed: int = TIMED,
) -> dict[str, Any]:
    """A profile on clips that had no part in it; `timed` of them in turns with the target alone."""
    profile = found.profile
    policy = AcceptancePolicy.from_profile(profile)
    strict = Way("own", found.strict.candidate)
    own = {sample.id: record for sample, record in runs.captions(strict, unseen)}
    way = Way("profile", Candidate(policy, profile.config["gamma"]))
    captions = runs.captions(way, unseen, timed=timed)
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
        "sets": len(rows),
        "certified": sum(row["certified"] for row in rows),
        "kept": sum(row["fidelity"] >= wanted for row in rows),
        "tau": within("tau"),
        "decode_speedup": within("decode_speedup"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
