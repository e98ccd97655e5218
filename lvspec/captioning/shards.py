"""Rows on the disk: a journal while a shard is under way, a whole file once it is done."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from lvspec.captioning.rows import Row, Settings
from lvspec.environment import NotWritten, write_json
from lvspec.evaluation.journal import Journal, first_difference
from lvspec.evaluation.samples import Sample

if TYPE_CHECKING:
    import pyarrow

KIND = "captions of a shard"
SETTINGS = "settings.json"


class Shard(NamedTuple):
    """Which part of all samples.

    Attributes:
        index: From 1.
        count: How many there are.
    """

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of words such as "2/8".

        Raises:
            ValueError: They are others.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"shard: expected I/N with I from 1 to N, got {text}")
        return cls(int(found[1]), int(found[2]))

    @property
    def stem(self) -> str:
        """Of the names of its files."""
        return f"captions-{self.index}-of-{self.count}"

    def has(self, sample: Sample) -> bool:
        """Whether a sample is in it: by its id alone, so that others may be added to them."""
        # Not a checksum: of names that differ in a digit, those of even ones may all be even.
        digest = hashlib.sha256(sample.id.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1


class Known(NamedTuple):
    """What is known of an id: the newest of its rows."""

    error: str | None
    prompt: str
    number: int


class ShardFiles:
    """The files of one shard, for one writer: what is known of its samples, and what is added.

    While it is under way `<stem>.jsonl.part` grows line by line, see `Journal`. `close` makes
    `<stem>.jsonl` of it at once, one row an id. A shard that goes on later leaves this file as it
    is until it is replaced. To be used with `with`.

    Args:
        folder: Where; it exists.
        shard: Which.
        settings: What rows depend on; the first of all shards leaves them in `settings.json`.

    Attributes:
        known: By id.

    Raises:
        OSError: A file cannot be read or written, or another run is writing it.
        ValueError: The folder is one of other settings, or a file is damaged.
    """

    def __init__(self, folder: Path, shard: Shard, settings: Settings) -> None:
        self.known: dict[str, Known] = {}
        self.path = folder / f"{shard.stem}.jsonl"
        self._count = 0
        _agree(folder / SETTINGS, settings)
        self._journal = Journal(part_of(self.path), KIND, settings.values, reader=self._know)
        try:
            for _, row in lines_of(self.path):
                self.known.setdefault(row["id"], _known(row, _CLOSED))
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_closed:
            part_of(self.path).unlink(missing_ok=True)
        self._journal.close()

    @property
    def is_closed(self) -> bool:
        """Whether all rows are in the file that is whole."""
        return self.path.exists() and self._count == 0

    def add(self, row: Row) -> None:
        """Append a row; it is on the disk when this returns.

        Raises:
            NotWritten: The disk is full, for instance.
        """
        self._journal.add(row)

    def close(self, *, parquet: bool) -> None:
        """Every sample has a row: make the file that is whole, and perhaps a table beside it.

        Raises:
            ImportError: `parquet` needs pyarrow.
            NotWritten: There is no room; what there was stands.
        """
        table = self.path.with_suffix(".parquet")
        try:
            if not self.is_closed:
                table.unlink(missing_ok=True)  # of fewer rows
                with _replacing(self.path) as partial, open(partial, "wb") as file:
                    file.writelines(self._newest())
                    file.flush()
                    os.fsync(file.fileno())
            if parquet:
                with _replacing(table) as partial:
                    write_parquet(partial, (row for _, row in lines_of(self.path)))
        except OSError as error:
            raise NotWritten(
                f"{self.path}: expected a file that can be written, got: {error.strerror or error}"
            ) from error
        # Last of all: whoever dies before reads these rows twice, and none is lost.
        part_of(self.path).unlink(missing_ok=True)
        self._count = 0

    def _know(self, row: Row) -> None:
        self.known[row["id"]] = _known(row, self._count)
        self._count += 1

    def _newest(self) -> Iterator[bytes]:
        """Of every id the last line."""
        for line, row in lines_of(self.path):
            if self.known[row["id"]].number == _CLOSED:
                yield line
        for number, (line, row) in enumerate(lines_of(part_of(self.path))):
            if self.known[row["id"]].number == number:
                yield line


_CLOSED = -1
"""In place of the number of a line in the journal: the row is in the file that is whole."""


def _known(row: Row, number: int) -> Known:
    return Known(row["error"], sys.intern(row["prompt"]), number)


def part_of(path: Path) -> Path:
    """The journal of a file."""
    return path.with_name(f"{path.name}.part")


def lines_of(path: Path) -> Iterator[tuple[bytes, Row]]:
    """(line, row) of a file of rows, whole or a journal; none where there is no such file.

    A line that an interruption tore is left out.

    Raises:
        ValueError: A line is damaged.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: expected a row, got a damaged line"
                ) from error
            if number > 1 or "lvspec" not in row:
                yield line, row


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """The name of a file that takes the place of `path` at the end, and not if that fails."""
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _agree(path: Path, settings: Settings) -> None:
    """Leave the settings in the folder, or refuse others than those that are there.

    Raises:
        ValueError: Names the first difference.
    """
    values = {"lvspec": "settings of captions", "digest": settings.digest}
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    write_json(partial, {**values, "settings": settings.values}, name="out")
    try:
        os.link(partial, path)  # of several that begin at once, one is the first
    except FileExistsError:
        found = json.loads(path.read_text(encoding="utf-8"))
        different = first_difference(found["settings"], settings.values)
        if different is not None:
            name, before, now = different
            raise ValueError(
                f"{name}: expected {before!r}, with which {path.parent} was begun, got {now!r} "
                "(other settings need a folder of their own)"
            ) from None
    finally:
        partial.unlink()


def row_schema() -> pyarrow.Schema:
    """Of rows in a table.

    Raises:
        ImportError: pyarrow is not installed.
    """
    import pyarrow

    text = pyarrow.string()
    return pyarrow.schema(
        [
            *((name, text) for name in ("id", "video", "prompt", "caption")),
            ("tokens", pyarrow.list_(pyarrow.int32())),
            *((name, pyarrow.float64()) for name in ("tau", "regret", "seconds")),
            ("warnings", pyarrow.list_(text)),
            *((name, text) for name in ("error", "settings")),
        ]
    )


def write_parquet(path: Path, rows: Iterable[Row]) -> None:
    """Rows as a table.

    Raises:
        ImportError: pyarrow is not installed.
    """
    import pyarrow
    from pyarrow import parquet

    schema = row_schema()
    rows = iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            # Bytes of a name that are not UTF-8 are spelled out, as JSON does.
            spelled = json.loads(json.dumps(some, ensure_ascii=False).encode("utf-8", "replace"))
            writer.write_table(pyarrow.Table.from_pylist(spelled, schema))


_ROWS_AT_ONCE = 1000
