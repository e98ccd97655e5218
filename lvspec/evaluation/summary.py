"""Records of all methods to one row each: speed, acceptance, fidelity, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from lvspec.evaluation.intervals import CONFIDENCE, mean_interval, share_interval
from lvspec.evaluation.records import Record, Timing, acceptance
from lvspec.evaluation.samples import Sample
from lvspec.evaluation.speeds import speeds

SHARES = ("choice", "own_choice", "own_same")
"""Metrics that say right or wrong."""


def summaries(
    methods: Sequence[str],
    records: Mapping[tuple[str, str], Record],
    samples: Sequence[Sample],
    reference: str | None,
    confidence: float = CONFIDENCE,
) -> list[dict[str, Any]]:
    """One row for each method, see `summary`."""
    ids = [sample.id for sample in samples]
    given = {"reference": reference, "confidence": confidence}
    categories = {sample.id: sample.category for sample in samples}
    return [summary(name, records, ids, categories=categories, **given) for name in methods]


def summary(
    method: str,
    records: Mapping[tuple[str, str], Record],
    ids: Iterable[str],
    *,
    reference: str | None,
    categories: Mapping[str, str | None],
    confidence: float = CONFIDENCE,
) -> dict[str, Any]:
    """One row of the table.

    Args:
        method: By name.
        records: By (id, method).
        ids: Samples that count.
        reference: The method whose captions are the target's own; None: there is none.
        categories: Of each sample.
        confidence: Of the intervals.

    Returns:
        `method`, `captions` (how many), `failed`, and `error` (the first, if any); where there are
        captions: `tokens_per_s`, `speedup`, `decode_speedup` (against `reference`, of the samples
        that both captioned; None where that is not known), `prefill_s` (median), `tau` and
        `tau_without_bonus`, `acceptance` (all steps together, as in a record), `regret` (nats a
        caption), `regret_per_token`, `cache` of HF's, `gamma` (all lengths that there were),
        `warm_up_s`, `scores` (by metric: `mean`, `low`, `high`, `count`), and `by_category` (the
        means of `scores`).
    """
    found = [(i, record) for i in ids if (record := records.get((i, method))) is not None]
    done = [record for _, record in found if record["error"] is None]
    errors = [record["error"] for _, record in found if record["error"] is not None]
    row: dict[str, Any] = {"method": method, "captions": len(done), "failed": len(errors)}
    row["error"] = errors[0] if errors else None
    if not done:
        return row
    row |= _speeds(done, records, reference)
    tau = row["tau"]
    warm_up = [record["warm_up_s"] for record in done if "warm_up_s" in record]
    prefills = [record["prefill_s"] for record in done if record["prefill_s"] is not None]
    regrets = [record["stats"]["regret"] for record in done]
    row |= {
        "prefill_s": median(prefills) if prefills else None,
        "tau_without_bonus": None if tau is None else tau - 1,
        "acceptance": _acceptance([record["acceptance"] for record in done]),
        "regret": fmean(regrets),
        "regret_per_token": sum(regrets) / max(1, sum(len(r["tokens"]) for r in done)),
        "cache": done[-1]["stats"].get("cache"),
        "gamma": _each_once(record["stats"].get("gamma") for record in done),
        "warm_up_s": warm_up[0] if warm_up else None,
        "scores": _scores(done, confidence),
    }
    groups: dict[str, list[Record]] = {}
    for record in done:
        if (category := categories.get(record["id"])) is not None:
            groups.setdefault(category, []).append(record)
    row["by_category"] = {
        name: {metric: score["mean"] for metric, score in _scores(group, confidence).items()}
        for name, group in groups.items()
    }
    return row


def _speeds(
    done: list[Record], records: Mapping[tuple[str, str], Record], reference: str | None
) -> dict[str, Any]:
    mine = [Timing.of(record) for record in done]
    row = speeds(mine, mine)
    both = [
        (Timing.of(record), Timing.of(other))
        for record in done
        if reference is not None
        and (other := records.get((record["id"], reference))) is not None
        and other["error"] is None
    ]
    compared = speeds(*zip(*both)) if both else {}
    return row | {name: compared.get(name) for name in ("speedup", "decode_speedup")}


def _acceptance(all_of_them: list[Mapping[str, Any]]) -> dict[str, Any]:
    """All requests together."""
    steps = sum(each["steps"] for each in all_of_them)
    accepted = sum(each["accepted"] for each in all_of_them)
    known = [each["drafted"] for each in all_of_them if each["drafted"] is not None]
    drafted = sum(known) if len(known) == len(all_of_them) else None
    longest = max(len(each["accepted_by_position"]) for each in all_of_them)
    positions = [0] * longest
    for each in all_of_them:
        for position, count in enumerate(each["accepted_by_position"]):
            positions[position] += count
    return acceptance(steps, drafted, accepted, positions)


def _scores(records: list[Record], confidence: float) -> dict[str, dict[str, Any]]:
    by_name: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.get("scores", {}).items():
            by_name.setdefault(name, []).append(value)
    return {name: _score(name, values, confidence) for name, values in by_name.items()}


def _score(name: str, values: list[float], confidence: float) -> dict[str, Any]:
    found = {"mean": fmean(values), "count": len(values), "low": None, "high": None}
    if name in SHARES:
        low, high = share_interval(round(math.fsum(values)), len(values), confidence)
    elif all(0 <= value <= 1 for value in values):
        low, high = mean_interval(values, confidence)
    else:  # nothing is known of where such scores end
        return found
    return found | {"low": low, "high": high}


def _each_once(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(value for value in values if value))
