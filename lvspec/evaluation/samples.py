"""What is asked of which video: lines of a manifest, or the files of a folder."""

from __future__ import annotations

import glob
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvspec.checks import check_type

VIDEO_SUFFIXES = frozenset(".avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ts .webm .wmv .gif".split())
"""By what the files of a folder are known for videos, in lower case."""


@dataclass(frozen=True)
class Sample:
    """One video and what is asked about it.

    Attributes:
        id: Of this sample alone.
        video: Path of the file.
        prompt: What is asked.
        references: Texts that are right, for metrics of similarity.
        choices: Of a multiple choice question, as the prompt lists them.
        answer: What is right: the letter or the text of a choice, or a free answer.
        category: A group of its own in summaries.
        questions: (question, answer) pairs that a judge asks of the caption.
        duration: Of the video, in seconds, where that is known.
    """

    id: str
    video: str
    prompt: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answer: str | None = None
    category: str | None = None
    questions: tuple[tuple[str, str], ...] = ()
    duration: float | None = None

    @property
    def expected(self) -> tuple[str, ...]:
        """The texts to compare with: the references, or else a free answer."""
        if self.references or self.choices or self.answer is None:
            return self.references
        return (self.answer,)


@dataclass(frozen=True)
class Problem:
    """What is wrong with one line of a file.

    Attributes:
        where: The file and the line, or another place in it.
        message: What was expected there and what came.
    """

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Samples:
    """What was read, and what was not because something is wrong with it."""

    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...] = ()


def read_manifest(
    path: str | os.PathLike, *, prompt: str | None = None, check_files: bool = True
) -> Samples:
    """The samples of a `manifest.jsonl`, one JSON object a line.

    Keys are those of `Sample`; `video` (relative to the manifest) and `prompt` must be there, and
    others are left alone. Without an `id` the video, as it stands there, is one.

    Args:
        path: The manifest.
        prompt: Of lines that have none; None: each must have its own.
        check_files: Whether a file that is missing is a problem of its line.

    Returns:
        The samples, and a problem for each line that is none: no JSON, a file that is missing, an
        empty prompt, an id that came before, a value of another type.

    Raises:
        OSError: The manifest cannot be read.
    """
    collector = Collector(Path(path).parent, check_files=check_files)
    given = {} if prompt is None else {"prompt": prompt}
    with open(path, "rb") as lines:
        for number, ended in enumerate(lines, 1):
            line = ended.rstrip(b"\n")
            if line.strip():
                where = f"{path}, line {number}"
                collector.add(where, lambda line=line: {**given, **_object(line)})
    return collector.collected()


def samples_of_folder(folder: str | os.PathLike, prompt: str) -> Samples:
    """One sample for each video in a folder, by name; names of files are ids.

    Raises:
        OSError: The folder cannot be read.
        ValueError: There is no video in it, or the prompt is empty.
    """
    if not prompt.strip():
        raise ValueError(f"prompt: expected a text, got {prompt!r}")
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"videos: expected a folder, got {folder}")
    names = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_file() and os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES
    )
    if not names:
        kinds = ", ".join(sorted(VIDEO_SUFFIXES))
        raise ValueError(f"videos: expected a folder with videos ({kinds}), got {folder}")
    return Samples(tuple(Sample(name, os.path.join(folder, name), prompt) for name in names))


def samples_of_pattern(pattern: str, prompt: str) -> Samples:
    """One sample for each file that a pattern such as `clips/**/*.mp4` finds; paths are ids.

    Raises:
        ValueError: It finds no file, or the prompt is empty.
    """
    if not prompt.strip():
        raise ValueError(f"prompt: expected a text, got {prompt!r}")
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise ValueError(f"videos: expected a pattern that finds videos, got {pattern}")
    return Samples(tuple(Sample(path, path, prompt) for path in paths))


def samples_of(given: Samples | Iterable[Sample]) -> Samples:
    """The same, checked.

    Raises:
        TypeError: One is no sample.
        ValueError: Two have the same id.
    """
    if isinstance(given, Samples):
        return given
    samples = tuple(given)
    for sample in samples:
        check_type("samples", sample, Sample)
    for name, count in Counter(sample.id for sample in samples).items():
        if count > 1:
            raise ValueError(f"samples: expected ids that differ, got {name!r} {count} times")
    return Samples(samples)


@dataclass
class Collector:
    """Makes samples of objects as they stand in files, and keeps what is wrong with others.

    Args:
        folder: Where relative paths of videos begin.
        check_files: Whether a file that is missing is a problem.
    """

    folder: Path
    check_files: bool = True
    _samples: list[Sample] = field(default_factory=list)
    _problems: list[Problem] = field(default_factory=list)
    _places: dict[str, str] = field(default_factory=dict)
    _unnamed: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, where: str, read: Callable[[], Mapping[str, Any]]) -> None:
        """Take what `read` returns, the keys of `Sample`; a ValueError is a problem at `where`."""
        try:
            values = read()
            sample = self._sample(values)
            named = "id" in values
            self._check_new(sample, named, where)
        except ValueError as error:
            self._problems.append(Problem(where, str(error)))
            return
        self._places[sample.id] = where
        self._samples.append(sample)

    def refuse(self, where: str, message: str) -> None:
        """Keep a problem."""
        self._problems.append(Problem(where, message))

    def collected(self) -> Samples:
        """Everything so far, in the order in which it came."""
        return Samples(tuple(self._samples), tuple(self._problems))

    def _sample(self, values: Mapping[str, Any]) -> Sample:
        video = _text(values, "video")
        file = os.fspath(self.folder / video)
        if self.check_files and not os.path.isfile(file):
            got = "a folder" if os.path.isdir(file) else "no such file"
            raise ValueError(f"video: expected a file, got {video}: {got}")
        answer, category = (_optional_text(values, name) for name in ("answer", "category"))
        return Sample(
            id=_text(values, "id") if "id" in values else self._free_id(video),
            video=file,
            prompt=_text(values, "prompt"),
            references=_texts(values, "references"),
            choices=_texts(values, "choices"),
            answer=answer,
            category=category,
            questions=_pairs(values, "questions"),
            duration=_seconds(values, "duration"),
        )

    def _free_id(self, video: str) -> str:
        """The video, or where several questions are asked about it, with a number behind it."""
        found, number = video, 1
        while found in self._places:
            number += 1
            found = f"{video}#{number}"
        return found

    def _check_new(self, sample: Sample, named: bool, where: str) -> None:
        if sample.id in self._places:
            raise ValueError(
                f"id: expected one that no other sample has, got {sample.id!r} again (first in "
                f"{self._places[sample.id]})"
            )
        if not named:
            key = (sample.video, sample.prompt)
            if key in self._unnamed:
                raise ValueError(
                    "id: expected one where video and prompt are those of another sample, got "
                    f"none (first in {self._unnamed[key]})"
                )
            self._unnamed[key] = where


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"expected a JSON object, got {_short(line)}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {_short(line)}")
    return value


def _short(line: bytes) -> str:
    text = line.decode("utf-8", "backslashreplace").strip()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text, got {value!r}")
    if not value.strip():
        raise ValueError(f"{name}: expected a text, got an empty one")
    return value


def _optional_text(values: Mapping[str, Any], name: str) -> str | None:
    return None if values.get(name) is None else _text(values, name)


def _seconds(values: Mapping[str, Any], name: str) -> float | None:
    found = values.get(name)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 <= found < math.inf:
        raise ValueError(f"{name}: expected seconds, got {found!r}")
    return float(found)


def _texts(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    found = values.get(name)
    if found is None:
        return ()
    if not isinstance(found, list):
        raise ValueError(f"{name}: expected a list of texts, got {found!r}")
    return tuple(_each_text(name, found))


def _each_text(name: str, values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name}: expected texts, got {value!r}")
        yield value


def _pairs(values: Mapping[str, Any], name: str) -> tuple[tuple[str, str], ...]:
    found = values.get(name)
    if found is None:
        return ()
    if not isinstance(found, list):
        raise ValueError(f"{name}: expected a list of question and answer, got {found!r}")
    pairs = []
    for each in found:
        if not isinstance(each, dict):
            raise ValueError(f"{name}: expected objects with question and answer, got {each!r}")
        pairs.append((_text(each, "question"), _text(each, "answer")))
    return tuple(pairs)
