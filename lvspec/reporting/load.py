"""What a page is made of: the JSON of `lvspec generate --json`, or an evaluation's JSONL."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvspec.engine.result import Generation

CAPTIONS, CAPTIONS_VERSION = "captions", 1
"""What a file of `lvspec generate --json` says of itself."""

EVALUATION, EVALUATION_VERSION = "evaluation", 1
"""What the first line of an evaluation says of itself."""

_WANTED = "expected the JSON of `lvspec generate --json` or the JSONL of `lvspec evaluate`"


@dataclass(frozen=True)
class Captions:
    """What `lvspec generate` wrote.

    Attributes:
        results: One a video, as `Generation.to_dict` has it, with `video`, `prompt`, `error`,
            `interrupted` and perhaps `frames`.
        facts: What the results have in common: environment, models, policy, config.
        source: Where it stands; empty for a generation in memory.
        interrupted: Whether the run was.
    """

    results: tuple[Mapping[str, Any], ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    interrupted: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What `lvspec evaluate` wrote.

    Attributes:
        records: One a sample and method.
        settings: What they depend on.
        source: Where it stands.
        torn: Whether the last line was cut, as by an interruption.
    """

    records: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]
    source: str
    torn: bool = False


def load(source: str | os.PathLike | Generation, **about: Any) -> Captions | Evaluation:
    """What a file or a generation holds.

    Args:
        source: A file, or a generation, whose page lacks what only its caller knows.
        **about: Of a generation: `video`, `prompt`, `policy`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is something else, of another version, or there is nothing in it.
    """
    if isinstance(source, Generation):
        facts = {name: about.pop(name) for name in ("policy",) if name in about}
        outcome = {"video": "", "prompt": "", "error": None, "interrupted": False, **about}
        return Captions(({**source.to_dict(), **outcome},), facts)
    path = os.fspath(source)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {_WANTED}, got bytes that are not UTF-8") from error
    try:
        values = json.loads(text)
    except ValueError:
        return _evaluation(path, text)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {_WANTED}, got a {_kind_of(values)}")
    if values.get("lvspec") == EVALUATION:  # nothing but its first line
        return _evaluation(path, text)
    return _captions(path, values)


def _captions(path: str, values: Mapping[str, Any]) -> Captions:
    kind, version = values.get("lvspec", CAPTIONS), values.get("version", CAPTIONS_VERSION)
    if kind != CAPTIONS:
        raise ValueError(f"{path}: {_WANTED}, got a file of lvspec that is a {kind}")
    results = values.get("results")
    if not isinstance(results, list):
        raise ValueError(f"{path}: {_WANTED}, got JSON without a list of results")
    _check_version(path, version, CAPTIONS_VERSION)
    if not results:
        got = "none: it was interrupted before the first" if values.get("interrupted") else "none"
        raise ValueError(f"{path}: expected at least one result, got {got}")
    for number, result in enumerate(results, 1):
        if not isinstance(result, dict):
            raise ValueError(
                f"{path}: expected an object as result {number}, got a {_kind_of(result)}"
            )
    rest = {name: value for name, value in values.items() if name != "results"}
    return Captions(tuple(results), rest, path, bool(values.get("interrupted")))


def _evaluation(path: str, text: str) -> Evaluation:
    first, *lines = text.split("\n")
    head = _object(first)
    if head is None or "lvspec" not in head:
        raise ValueError(f"{path}: {_WANTED}, got neither ({_beginning(first)})")
    if head["lvspec"] != EVALUATION:
        raise ValueError(f"{path}: {_WANTED}, got a file of lvspec that is a {head['lvspec']}")
    _check_version(path, head.get("version"), EVALUATION_VERSION)
    torn = bool(lines and lines[-1])
    records = []
    for number, line in enumerate(lines[:-1], 2):
        record = _object(line)
        if record is None:
            raise ValueError(f"{path}, line {number}: expected a record, got {_beginning(line)}")
        records.append(record)
    if not records:
        raise ValueError(f"{path}: expected at least one record, got none")
    settings = head.get("settings")
    return Evaluation(tuple(records), settings if isinstance(settings, dict) else {}, path, torn)


def _check_version(path: str, found: Any, known: int) -> None:
    if found != known:
        raise ValueError(
            f"{path}: expected version {known}, got {found} (another version of lvspec made it)"
        )


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _beginning(line: str) -> str:
    return repr(line if len(line) <= 40 else f"{line[:37]}...")


def _kind_of(value: Any) -> str:
    names = {list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def choose(captions: Captions, wanted: Sequence[str]) -> Captions:
    """Some of the results, by number (from 1) or by the path or file name of their video.

    Raises:
        ValueError: There is none of that name or number.
    """
    chosen = []
    for name in wanted:
        found = [
            result
            for number, result in enumerate(captions.results, 1)
            if name in (str(number), result.get("video"))
            or name == os.path.basename(str(result.get("video")))
        ]
        if not found:
            count = len(captions.results)
            raise ValueError(
                f"captions: expected numbers from 1 to {count} or videos of {captions.source}, "
                f"got {name!r}"
            )
        chosen += [result for result in found if result not in chosen]
    return Captions(tuple(chosen), captions.facts, captions.source, captions.interrupted)
