"""What an evaluation found, on a terminal of eighty columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lvspec.cli.say import say
from lvspec.evaluation.evaluate import RECORDS, SUMMARY, Evaluation
from lvspec.evaluation.intervals import samples_needed

_FIDELITY = ("own_choice", "own_chrf")
"""What stands for fidelity in the table, the first that there is."""
_WORDS = {
    "own_choice": "same choice as the target's own",
    "own_chrf": "chrF against the target's own",
    "own_same": "word for word the target's own",
    "own_rouge_l": "ROUGE-L against the target's own",
    "choice": "right choice",
    "chrf": "chrF",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
    "judge": "right by the judge",
    "judge_score": "the judge's score",
}


def print_evaluation(done: Evaluation, *, judge: bool, confidence: float) -> None:
    """Print the table, the scores beside it, and what is missing."""
    console = Console()
    console.print(_table(done, confidence))
    scores = _score_table(done)
    if scores is not None:
        console.print(scores)
    console.print(_notes(done, judge, confidence), highlight=False, markup=False)
    for row in done.rows:
        if row["error"] is not None:
            count = f"{row['failed']} of {row['failed'] + row['captions']} captions failed"
            say(f"{row['method']}: {count}: {row['error']}", kind="error")
    for name, why in done.left_out.items():
        say(f"{name}: left out: {why}")
    for note in done.notes:
        say(note, kind="error")


def _table(done: Evaluation, confidence: float) -> Table:
    captions = sum(row["captions"] for row in done.rows)
    wanted = len(done.samples) * len(done.rows)
    part = "" if captions == wanted else f", {captions} of {wanted} captions"
    table = _new(f"{len(done.samples)} samples, {len(done.rows)} methods{part}")
    for heading in ("tok/s", "whole", "decode", "tau", "-bonus", "fidelity", "regret"):
        table.add_column(heading, justify="right", no_wrap=True)
    fidelity = _fidelity(done)
    for row in done.rows:
        if not row["captions"]:
            table.add_row(row["method"], *["-"] * 7)
            continue
        table.add_row(
            row["method"],
            f"{row['tokens_per_s']:.0f}"
            if row["tokens_per_s"] >= 10
            else f"{row['tokens_per_s']:.1f}",
            _number(row["speedup"], "x"),
            _number(row["decode_speedup"], "x"),
            _number(row["tau"]),
            _number(row["tau_without_bonus"]),
            _interval(row["scores"].get(fidelity)),
            f"{row['regret']:.2f}",
            style="bold" if row["method"] == "lvspec" else None,
        )
    table.caption = (
        f"tok/s, whole, decode: medians; whole and decode: speed-up over {done.reference} with "
        "and without the prefill; tau: tokens per pass of the target, and without the bonus token; "
        f"fidelity: {_WORDS.get(fidelity or '', 'not known')}, mean and {confidence:.0%} interval; "
        "regret: nats per caption"
    )
    return table


def _score_table(done: Evaluation) -> Table | None:
    """Every other score, a column each; None where there is no other."""
    shown = _fidelity(done)
    names = list(dict.fromkeys(name for row in done.rows for name in row.get("scores", ())))
    names = [name for name in names if name != shown]
    if not names:
        return None
    table = _new("scores")
    for number, _ in enumerate(names, 1):
        table.add_column(f"({number})", justify="right", no_wrap=True)
    for row in done.rows:
        scores = row.get("scores", {})
        wide = len(names) <= 3
        cells = [_interval(scores.get(name)) if wide else _mean(scores.get(name)) for name in names]
        table.add_row(row["method"], *cells)
    words = [f"({n}) {_WORDS.get(name, name)}" for n, name in enumerate(names, 1)]
    table.caption = "; ".join(words) + "; intervals in the summary"
    return table


def _new(title: str) -> Table:
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    return table


def _notes(done: Evaluation, judge: bool, confidence: float) -> str:
    lines = []
    prefills = [
        f"{row['method']} {row['prefill_s']:.3f} s" for row in done.rows if row.get("prefill_s")
    ]
    if prefills:
        lines.append(f"prefill, median: {', '.join(prefills)}")
    caches = [f"{row['method']} {row['cache']}" for row in done.rows if row.get("cache")]
    if caches:
        lines.append(f"cache: {', '.join(caches)}")
    gammas = [
        f"{row['method']} {' then '.join(map(str, row['gamma']))}"
        for row in done.rows
        if row.get("gamma")
    ]
    if gammas:
        lines.append(f"gamma: {', '.join(gammas)}")
    if not judge:
        lines.append("judge: none (--judge-url); the scores are those that need none")
    lines.append(
        f"to know a share of 99 % with {confidence:.0%} confidence takes "
        f"{samples_needed(0.99, confidence)} samples without a failure"
    )
    lines.append(f"summary: {done.folder / SUMMARY}")
    lines.append(f"captions: {done.folder / RECORDS} (lvspec report makes a page of it)")
    return "\n".join(lines)


def _fidelity(done: Evaluation) -> str | None:
    found = {name for row in done.rows for name in row.get("scores", ())}
    return next((name for name in _FIDELITY if name in found), None)


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


def _mean(score: dict[str, Any] | None) -> str:
    return "-" if score is None else f"{score['mean']:.3f}"


def _interval(score: dict[str, Any] | None) -> str:
    if score is None or score["low"] is None:
        return _mean(score)
    return f"{score['mean']:.3f} {score['low']:.2f}-{score['high']:.2f}"
