"""Scores of captions that stand in a journal: by metrics, and by a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tqdm import tqdm

from lvspec.evaluation.journal import Journal
from lvspec.evaluation.judge import Judge, JudgeError
from lvspec.evaluation.metrics import METRICS, MetricError, score
from lvspec.evaluation.records import Record, merged
from lvspec.evaluation.samples import Sample

_GIVE_UP = 3
"""Failures in a row after which the judge is not there."""


def scored(
    samples: Sequence[Sample], journal: Journal, metrics: Sequence[str], reference: str | None
) -> list[str]:
    """Give every caption its scores, and write the journal anew, with one line for each caption.

    Args:
        samples: Those whose captions are scored.
        journal: Has the captions.
        metrics: A user's own, beside all of `METRICS`.
        reference: The method that says what the target says by itself, if there is one.

    Returns:
        What went wrong, one sentence each.
    """
    records = merged(journal.records)
    problems: dict[str, str] = {}
    by_id = {sample.id: sample for sample in samples}
    for (key, _), record in records.items():
        if key not in by_id or record["error"] is not None:
            continue
        found, text = _judge_of(record), _own_text(records, key, reference)
        for name in (*METRICS, *metrics):
            try:
                found |= score(record["text"], by_id[key], text, [name])
            except MetricError as error:
                problems.setdefault(name, str(error))
        record["scores"] = found
    journal.rewrite(records.values())
    return list(problems.values())


def judged(
    judge: Judge, samples: Sequence[Sample], journal: Journal, show_progress: bool | None
) -> list[str]:
    """Ask the judge about every caption that it has not judged, and write down what it says.

    Returns:
        What went wrong, one sentence each.
    """
    records = merged(journal.records)
    by_id = {sample.id: sample for sample in samples}
    wanted = [
        (key, record)
        for key, record in records.items()
        if key[0] in by_id and record["error"] is None and record.get("judge") != judge.model
    ]
    known: dict[tuple[str, str], dict[str, float]] = {}
    problems, in_a_row, done = [], 0, 0
    disable = None if show_progress is None else not show_progress
    for (name, method), record in tqdm(wanted, desc="judged", disable=disable, leave=False):
        text = record["text"]
        try:
            # Methods often say the same, which is judged once.
            scores = known.get((name, text)) or judge.scores(text, by_id[name])
        except JudgeError as error:
            problems.append(str(error))
            in_a_row += 1
            if in_a_row == _GIVE_UP:
                break
            continue
        in_a_row, done, known[name, text] = 0, done + 1, scores
        journal.add({"id": name, "method": method, "judge": judge.model, "scores": scores})
    if not problems:
        return []
    left = len(wanted) - done
    return [f"{left} captions are not judged, the same command asks again: {problems[0]}"]


def _judge_of(record: Record) -> dict[str, float]:
    return {
        name: value
        for name, value in record.get("scores", {}).items()
        if name in ("judge", "judge_score")
    }


def _own_text(
    records: Mapping[tuple[str, str], Record], key: str, reference: str | None
) -> str | None:
    """What the target says by itself of a sample; None where that is not known."""
    record = records.get((key, reference)) if reference is not None else None
    return None if record is None or record["error"] is not None else record["text"]
