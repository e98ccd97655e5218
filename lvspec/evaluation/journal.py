"""A file of records that grows line by line, and that an interrupted run goes on with."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from lvspec.environment import NotWritten, plain

VERSION = 1


class Journal:
    """An append-only JSONL file that survives interruption.

    Its first line is `{"lvspec": kind, "version": 1, "settings": {...}}`, and each further line a
    record. What was added is on the disk when `add` returns; a line that an interruption tore is
    dropped when the file is opened again. To be used with `with`.

    Args:
        path: The file; it is made where there is none, in a folder that exists.
        kind: Of the records.
        settings: What the records depend on, as plain values.
        reader: Gets each record that stood in the file when it was opened, and each that is added,
            in place of `records`: where a million of them have no place in memory.

    Attributes:
        records: What stood in the file when it was opened, and what was added since; without a
            `reader`.

    Raises:
        OSError: It cannot be read or written, or another process is writing it.
        ValueError: It is no journal of this kind, version or settings; names the first difference;
            or a line in its midst is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        kind: str,
        settings: Mapping[str, Any],
        *,
        reader: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.records: list[dict[str, Any]] = []
        self._keep = self.records.append if reader is None else reader
        self._header = {"lvspec": kind, "version": VERSION, "settings": plain(settings)}
        self._open()
        try:
            self._begin(self._header)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record.

        Raises:
            NotWritten: The disk is full, for instance; the file is as it was.
            TypeError: A value has no form in JSON.
        """
        values = plain(record)
        self._write(values)
        self._keep(values)

    def rewrite(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Put these records in place of all others, at once: the old ones stand until then.

        Raises:
            NotWritten: There is no room; the file is as it was.
            TypeError: A value has no form in JSON.
        """
        values = [plain(record) for record in records]
        partial = f"{self.path}.{uuid.uuid4().hex}.part"
        try:
            with open(partial, "wb") as file:
                file.writelines(map(_line, [self._header, *values]))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        except OSError as error:
            raise self._not_written(error) from error
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial)
        self.close()
        self._open()
        self.records[:] = values

    def close(self) -> None:
        """Close the file; the second time nothing happens."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows, where two runs with one file are the user's own matter
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(
                f"{self.path}: expected a file that no other run is writing, got one that is"
            ) from error

    def _begin(self, header: dict[str, Any]) -> None:
        with open(self.path, "rb") as file:
            first = file.readline()
            if not first.endswith(b"\n"):
                # A header that was torn is the beginning of one; whatever else it is is not ours.
                start = b'{"lvspec"'
                if first[: len(start)] != start[: len(first)]:
                    raise ValueError(f"{self.path}: expected a file of lvspec, got another")
                os.ftruncate(self._file, 0)
                self._write(header)
                return
            if first != _line(header):
                self._compare(_parsed(first), header)
            length = len(first)
            for number, each in enumerate(file, 2):
                if not each.endswith(b"\n"):
                    break
                record = _parsed(each)
                if record is None:
                    raise ValueError(
                        f"{self.path}, line {number}: expected a record, got a damaged line "
                        "(remove it, and what it was about is done again)"
                    )
                self._keep(record)
                length += len(each)
        os.ftruncate(self._file, length)  # a torn line, once it is known that the file is ours

    def _compare(self, found: dict[str, Any] | None, header: dict[str, Any]) -> None:
        kind = header["lvspec"]
        if found is None or "lvspec" not in found:
            raise ValueError(f"{self.path}: expected a file of lvspec {kind}, got another")
        if found["lvspec"] != kind:
            raise ValueError(
                f"{self.path}: expected a file of lvspec {kind}, got one of {found['lvspec']}"
            )
        if found.get("version") != VERSION:
            raise ValueError(
                f"{self.path}: expected version {VERSION}, got {found.get('version')} (another "
                "version of lvspec made it)"
            )
        settings = found.get("settings")
        difference = first_difference(
            settings if isinstance(settings, dict) else {}, header["settings"]
        )
        if difference is not None:
            name, before, now = difference
            raise ValueError(
                f"{name}: expected {_shown(before)}, with which {self.path} was begun, got "
                f"{_shown(now)} (other settings need a file or folder of their own)"
            )

    def _write(self, values: dict[str, Any]) -> None:
        # One call of the system: Ctrl-C comes before or after it, never in the midst of a line.
        line, size = _line(values), os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError("no space left on the device")
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> NotWritten:
        return NotWritten(
            f"{self.path}: expected a file that can be written, got: {error.strerror or error}"
        )


def first_difference(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    """(name, value before, value now) of the first setting that differs; None if none does.

    Settings within settings are named with a dot; what is missing is None.
    """
    for name in dict.fromkeys([*now, *before]):
        one, other = before.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found = first_difference(one, other, f"{prefix}{name}.")
            if found is not None:
                return found
        elif one != other:
            return f"{prefix}{name}", one, other
    return None


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _line(values: dict[str, Any]) -> bytes:
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
