"""An evaluation as its page shows it: methods beside each other, and where they differ most."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lvspec.evaluation.records import Record, merged
from lvspec.evaluation.summary import summary
from lvspec.evaluation.ways import AUTOREGRESSION, HF
from lvspec.reporting.figures import Chart, per_cent, trade_chart
from lvspec.reporting.load import Evaluation

_OWN = (AUTOREGRESSION, HF, "strict")
"""Methods that say what the target says by itself, the first that there is."""

FIDELITY = ("own_choice", "own_chrf", "choice", "chrf")
"""What stands for fidelity, the first that there is."""

WORDS = {
    "own_choice": "same choice as the target’s own",
    "own_chrf": "chrF against the target’s own",
    "own_same": "word for word the target’s own",
    "own_rouge_l": "ROUGE-L against the target’s own",
    "choice": "right choice",
    "chrf": "chrF against the references",
    "bleu": "BLEU against the references",
    "rouge_l": "ROUGE-L against the references",
    "judge": "right by the judge",
    "judge_score": "the judge’s score",
}

MOST_WORST = 12
"""Captions that are shown with their differences."""


@dataclass(frozen=True)
class Worst:
    """A caption that is unlike the target's own.

    Attributes:
        record: What was written of it.
        score: The fidelity by which it stands here, 1 being best.
        parts: (text, "same", "gone" or "new"): from the target's own text to this one.
    """

    record: Record
    score: float
    parts: tuple[tuple[str, str], ...]

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", f"{self.record['method']}-{self.record['id']}")


@dataclass(frozen=True)
class EvaluationView:
    """What a page says of an evaluation.

    Attributes:
        evaluation: As it was read.
        records: By (sample, method).
        rows: One a method, see `lvspec.evaluation.summary.summary`.
        reference: The method that says the target's own.
    """

    evaluation: Evaluation
    records: Mapping[tuple[str, str], Record]
    rows: list[dict[str, Any]]
    reference: str | None

    @property
    def ids(self) -> list[str]:
        return list(dict.fromkeys(sample for sample, _ in self.records))

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.get("scores", ())))

    @property
    def fidelity(self) -> str | None:
        return next((name for name in FIDELITY if name in self.metrics), None)

    @property
    def fidelity_words(self) -> str:
        return WORDS.get(self.fidelity or "", "not known")

    @property
    def missing(self) -> list[str]:
        """What is not there, and why."""
        notes = []
        wanted = len(self.ids) * len(self.rows)
        if len(self.records) < wanted:
            notes.append(
                f"{len(self.records)} of {wanted} captions are there: it was interrupted, or goes "
                "on. The same lvspec evaluate makes the others."
            )
        if self.evaluation.torn:
            notes.append("The last line was cut, as by an interruption, and is left out.")
        if self.reference is None:
            notes.append(
                f"None of the methods ({', '.join(_OWN)}) says the target’s own text, so there is "
                "no speed-up and nothing to compare texts with."
            )
        if self.fidelity is None:
            notes.append("No scores were written, so fidelity is not shown.")
        return notes

    @property
    def failed(self) -> list[tuple[str, int, str]]:
        """(method, how many captions failed, the first error)."""
        return [(row["method"], row["failed"], row["error"]) for row in self.rows if row["failed"]]

    @cached_property
    def chart(self) -> Chart | None:
        """Speed against fidelity; None where there is no fidelity."""
        if self.fidelity is None:
            return None
        name = "speedup" if self.reference is not None else "tokens_per_s"
        points = []
        for row in self.rows:
            score, speed = row.get("scores", {}).get(self.fidelity), row.get(name)
            if score is None or speed is None:
                continue
            method = row["method"]
            kind = {"lvspec": "ours", self.reference: "reference"}.get(method, "method")
            told = f"{method}: {speed:.2f}{'x' if name == 'speedup' else ' tokens/s'}"
            told += f", fidelity {per_cent(score['mean'])}"
            points.append((speed, score["mean"], kind, method, told))
        if not points:
            return None
        # Ours first: of labels that would overlap the first stays.
        points.sort(key=lambda point: point[2] != "ours")
        over = f"over {self.reference}" if self.reference else "in tokens/s"
        return trade_chart(
            points,
            title="Speed against fidelity, a point for each method",
            x_label=f"speed-up {over}, whole captions" if self.reference else "tokens/s",
            y_label="fidelity",
        )

    @cached_property
    def worst(self) -> list[Worst]:
        """Captions least like the target's own, worst first."""
        if self.reference is None or self.fidelity is None:
            return []
        found = []
        for (sample, method), record in self.records.items():
            own = self.records.get((sample, self.reference))
            score = record.get("scores", {}).get(self.fidelity)
            if method == self.reference or own is None or score is None:
                continue
            if record["error"] is None and own["error"] is None and record["text"] != own["text"]:
                found.append((score, sample, method, record, own["text"]))
        found.sort(key=lambda each: each[:3])
        return [
            Worst(record, score, word_changes(own, record["text"]))
            for score, _, _, record, own in found[:MOST_WORST]
        ]


def evaluation_view(evaluation: Evaluation) -> EvaluationView:
    """The view of an evaluation.

    Raises:
        ImportError: scipy is not installed, by which intervals are found.
        ValueError: A record is not what lvspec writes.
    """
    try:
        records = merged(evaluation.records)
        asked = evaluation.settings.get("methods") or ()
        methods = list(dict.fromkeys([*asked, *(method for _, method in records)]))
        found = {method for _, method in records}
        methods = [method for method in methods if method in found]
        reference = next((name for name in _OWN if name in methods), None)
        ids = list(dict.fromkeys(sample for sample, _ in records))
        rows = [
            summary(method, records, ids, reference=reference, categories={}) for method in methods
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{evaluation.source}: expected records as lvspec evaluate writes them, got "
            f"{type(error).__name__}: {error}"
        ) from error
    if not rows:
        raise ValueError(f"{evaluation.source}: expected at least one caption, got none")
    return EvaluationView(evaluation, records, rows, reference)


def word_changes(before: str, after: str) -> tuple[tuple[str, str], ...]:
    """How a text becomes another, word by word: (text, "same", "gone" or "new")."""
    old, new = (re.findall(r"\w+|[^\w\s]", text) for text in (before, after))
    parts: list[tuple[str, str]] = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for what, i, j, k, m in matcher.get_opcodes():
        if what == "equal":
            parts.append((_joined(old[i:j]), "same"))
            continue
        if i < j:
            parts.append((_joined(old[i:j]), "gone"))
        if k < m:
            parts.append((_joined(new[k:m]), "new"))
    return tuple(parts)


def _joined(words: list[str]) -> str:
    """Words with spaces between, but before marks."""
    text = ""
    for word in words:
        text += word if not text or not word[0].isalnum() else f" {word}"
    return text
