"""One caption of an evaluation as a line of JSON, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lvspec.evaluation.methods import Output
from lvspec.evaluation.samples import Sample

Record = dict[str, Any]


def record_of(
    sample: Sample, method: str, output: Output | Exception, warm_up: float | None
) -> Record:
    """A caption, or why there is none, as plain values.

    Args:
        sample: What was captioned.
        method: By name.
        output: The caption, or what went wrong.
        warm_up: Seconds of the caption beforehand that does not count; None: there was none.

    Returns:
        `id`, `method`, `video`, `prompt`, `error`; of a caption also `seconds`, `prefill_s`,
        `decode_s` (None where it is not known), `text`, `pieces`, `tokens`, `stats`, of our own
        methods what else `Generation.to_dict` has, and `acceptance`, see `acceptance_of`.
    """
    record = {
        "id": sample.id,
        "method": method,
        "video": sample.video,
        "prompt": sample.prompt,
        "error": None,
    }
    if warm_up is not None:
        record["warm_up_s"] = warm_up
    if isinstance(output, Exception):
        return record | {"error": _reason(output)}
    record |= {
        "seconds": output.seconds,
        "prefill_s": output.prefill_seconds,
        "decode_s": output.decode_seconds,
    }
    if output.generation is not None:
        record |= output.generation.to_dict()
    else:
        record |= {
            "text": output.text,
            "tokens": output.ids,
            "stats": {"iterations": output.passes, "regret": 0.0, "cache": output.cache},
        }
    return record | {"acceptance": acceptance_of(record["stats"], len(output.ids))}


def _reason(error: Exception) -> str:
    """In one line; of errors that are about no argument and no file with their kind."""
    words = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) and words:
        return words
    return f"{type(error).__name__}: {words}".rstrip(": ")


def acceptance_of(stats: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """What one request drafted and accepted, by the names that serving engines have for it.

    Args:
        stats: Of a record.
        tokens: New tokens.

    Returns:
        `steps`, the passes of the target behind the prefill; `drafted` and `accepted` tokens, None
        where that is not known; `mean_acceptance_length`, `1 + accepted / steps`;
        `acceptance_rate`, `accepted / drafted`; `accepted_by_position`, how many steps accepted
        the first, second, ... drafted token. Whole steps count here, where `tau` counts what was
        output.
    """
    steps = stats["iterations"]
    if "drafted" not in stats:  # HF's do not say; what is output is the steps' own and accepted
        return acceptance(steps, None, max(tokens - 1 - steps, 0), [])
    drafted = stats["drafted"]
    positions = [round(share * steps) for share in stats["acceptance_by_position"]]
    return acceptance(steps, drafted, drafted - stats["counts"]["rejected"], positions)


def acceptance(
    steps: int, drafted: int | None, accepted: int, positions: list[int]
) -> dict[str, Any]:
    """As `acceptance_of` returns it, of counts."""
    return {
        "steps": steps,
        "drafted": drafted,
        "accepted": accepted,
        "mean_acceptance_length": 1 + accepted / steps if steps else None,
        "acceptance_rate": accepted / drafted if drafted else None,
        "accepted_by_position": positions,
    }


def merged(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Record]:
    """The records of a journal by (id, method).

    A caption takes the place of an earlier one of the same sample and method; a line without a
    caption, such as a judge's scores, completes it.
    """
    records: dict[tuple[str, str], Record] = {}
    for line in lines:
        key = line["id"], line["method"]
        if "video" in line:
            records[key] = dict(line)
        elif key in records:
            for name, value in line.items():
                known = records[key].get(name)
                both = isinstance(known, dict) and isinstance(value, dict)
                records[key][name] = {**known, **value} if both else value
    return records


@dataclass(frozen=True)
class Timing:
    """Of a record what `speeds` reads."""

    tokens: int
    passes: int
    seconds: float
    decode_seconds: float | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Timing:
        """That of a caption."""
        passes = record["stats"]["iterations"]
        return cls(len(record["tokens"]), passes, record["seconds"], record["decode_s"])
