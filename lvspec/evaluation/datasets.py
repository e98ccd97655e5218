"""Data sets in local folders, in the layouts that their authors publish. Nothing is downloaded.

A folder is what the data set's page has, with archives of videos unpacked anywhere within it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lvspec.evaluation.samples import VIDEO_SUFFIXES, Collector, Samples, read_manifest

Row = Mapping[str, Any]

VDC_ASPECTS = ("main_object", "detailed", "camera", "background")
"""Of VDC's captions those that are asked for; its one-sentence summaries are too short to tell."""

_VDC_PROMPTS = {
    "main_object": (
        "Describe the main subject of this video: what it looks like, what it does, where it is "
        "and how it moves."
    ),
    "detailed": "Describe this video in detail, in more than three sentences.",
    "camera": "Describe the camera work of this video: shots, angles, movements and changes.",
    "background": (
        "Describe the background of this video: the place, the objects in it, the weather and "
        "the time of day."
    ),
}


def read_dataset(name: str, folder: str | os.PathLike) -> Samples:
    """The samples of a data set.

    Args:
        name: "manifest" (a `manifest.jsonl`), "vdc" (wchai/Video-Detailed-Caption),
            "video-detail-caption" (lmms-lab/VideoDetailCaption), "moviechat"
            (Enxin/MovieChat-1K-test, or the training set) or "video-mme" (lmms-lab/Video-MME).
        folder: Where it is.

    Returns:
        The samples, and a problem for each row that is none, a missing video for instance.

    Raises:
        ImportError: Its tables are parquet, and pyarrow is not installed.
        OSError: The folder, or the file with the questions, is not there.
        ValueError: There is no reader of this name.
    """
    if name not in READERS:
        raise ValueError(f"dataset: expected one of {', '.join(READERS)}, got {name!r}")
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"dataset: expected a folder, got {folder}")
    return READERS[name](Path(folder))


def _manifest(folder: Path) -> Samples:
    return read_manifest(_first(folder, "manifest.jsonl"))


def _vdc(folder: Path) -> Samples:
    """`VDC_1k.jsonl`, and `VDCScore_qa/camera.jsonl` and others with what the judge asks."""
    file = _first(folder, "VDC_1k.jsonl")
    questions = {aspect: _vdc_questions(folder, aspect) for aspect in VDC_ASPECTS}
    reader = _Reader(folder)
    for where, row in reader.rows(file):
        for aspect in VDC_ASPECTS:
            reader.add(
                where,
                lambda row=row, aspect=aspect: {
                    "id": f"{_key(row, 'video_id')}:{aspect}",
                    "video": reader.video(_key(row, "video_name")),
                    "prompt": _VDC_PROMPTS[aspect],
                    "references": [_key(row, f"{aspect}_caption")],
                    "category": aspect,
                    "questions": questions[aspect].get(row["video_id"]),
                },
            )
    return reader.collected()


def _vdc_questions(folder: Path, aspect: str) -> dict[str, list[Row]]:
    """The questions about each video; the layout has one object a line, by video."""
    for name in ("VDCScore_qa", "VDCscore_qa", "annotations"):
        file = folder / name / f"{aspect}.jsonl"
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            return {
                key: qa for line in lines if line.strip() for key, qa in json.loads(line).items()
            }
    return {}


def _video_detail_caption(folder: Path) -> Samples:
    """A table with `video_name`, `question` and `answer`."""
    reader = _Reader(folder)
    for where, row in reader.rows(_first(folder, "data/test-*.parquet", "test*.json*")):
        reader.add(
            where,
            lambda row=row: {
                "video": reader.video(_key(row, "video_name")),
                "prompt": _key(row, "question"),
                "references": [_key(row, "answer")],
                "id": str(row.get("question_id") or row["video_name"]),
            },
        )
    return reader.collected()


def _moviechat(folder: Path) -> Samples:
    """One JSON file a video; answers are in `gt`, which `annotations` are without.

    Questions about the whole video alone: those about a moment need the video up to it.
    """
    reader = _Reader(folder)
    files: dict[str, Path] = {}
    for pattern in ("gt/gt/*.json", "gt/*.json", "annotations/*.json", "jsons/*.json"):
        for file in sorted(folder.glob(pattern)):
            files.setdefault(file.name, file)
    if not files:
        raise FileNotFoundError(
            f"dataset: expected gt/*.json, annotations/*.json or jsons/*.json, got none in {folder}"
        )
    for _, file in sorted(files.items()):
        for where, row in reader.rows(file):
            asked = row.get("global")
            for number, each in enumerate(asked if isinstance(asked, list) else [{}], 1):
                reader.add(
                    f"{where}, question {number}",
                    lambda row=row, each=each, number=number: {
                        "video": reader.video(_key(_object(row, "info"), "video_path")),
                        "id": f"{row['info']['video_path']}:{number}",
                        "prompt": _key(each, "question"),
                        "answer": each.get("answer"),
                        "category": row["info"].get("class"),
                    },
                )
    return reader.collected()


def _video_mme(folder: Path) -> Samples:
    """A table of multiple choice questions; videos are named by `videoID`."""
    reader = _Reader(folder)
    for where, row in reader.rows(_first(folder, "videomme/test-*.parquet", "*test*.json*")):
        reader.add(
            where,
            lambda row=row: {
                "id": _key(row, "question_id"),
                "video": reader.video(_key(row, "videoID")),
                "prompt": "\n".join(
                    [
                        "Answer this multiple choice question about the video with the letter of "
                        "the right choice alone.",
                        _key(row, "question"),
                        *row.get("options", ()),
                        "The letter of the right choice is:",
                    ]
                ),
                "choices": list(row.get("options", ())),
                "answer": _key(row, "answer"),
                "category": row.get("duration"),
            },
        )
    return reader.collected()


READERS: dict[str, Callable[[Path], Samples]] = {
    "manifest": _manifest,
    "vdc": _vdc,
    "video-detail-caption": _video_detail_caption,
    "moviechat": _moviechat,
    "video-mme": _video_mme,
}


class _Reader(Collector):
    """Collects samples of rows, and finds their videos by name wherever they were unpacked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._videos: dict[str, str] = {}
        for place, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in VIDEO_SUFFIXES:
                    path = os.path.relpath(os.path.join(place, name), folder)
                    self._videos.setdefault(name, path)
                    self._videos.setdefault(stem, path)

    def video(self, name: str) -> str:
        """Its path within the folder; the name itself where there is no such video."""
        return self._videos.get(os.path.basename(name), name)

    def rows(self, file: Path) -> Iterator[tuple[str, Row]]:
        """(file and row, row) of a table, a file with an object a line, or one JSON value."""
        if file.suffix == ".parquet":
            named = ((f"{file}, row {n}", row) for n, row in enumerate(_parquet(file), 1))
        elif file.suffix == ".jsonl":
            lines = file.read_bytes().split(b"\n")
            named = ((f"{file}, line {n}", x) for n, x in enumerate(lines, 1) if x.strip())
        else:
            named = iter([(str(file), file.read_bytes())])
        for where, value in named:
            try:
                found = json.loads(value) if isinstance(value, bytes) else value
            except ValueError as error:
                self.refuse(where, f"expected JSON, got: {error}")
                continue
            several = isinstance(found, list)
            for number, row in enumerate(found if several else [found], 1):
                place = f"{where}, row {number}" if several else where
                if isinstance(row, dict):
                    yield place, row
                else:
                    self.refuse(place, f"expected an object, got {row!r:.60}")


def _parquet(file: Path) -> Iterator[Row]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(
            f"dataset: expected pyarrow to read {file}, which is not installed (pip install "
            "'lvspec[evaluate]')"
        ) from error
    with ParquetFile(file) as table:
        for batch in table.iter_batches(256):
            yield from batch.to_pylist()


def _first(folder: Path, *patterns: str) -> Path:
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
    raise FileNotFoundError(f"dataset: expected {' or '.join(patterns)} in {folder}, got none")


def _key(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: expected a text, got {value!r}")
    return value


def _object(row: Row, name: str) -> Row:
    value = row.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, got {value!r}")
    return value
