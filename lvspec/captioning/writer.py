"""Text and disk behind the loop: rows are finished and written by a thread of their own."""

from __future__ import annotations

import queue
import threading
from types import TracebackType

from transformers import PreTrainedTokenizerBase

from lvspec.captioning.rows import Row
from lvspec.captioning.shards import ShardFiles


class Writer:
    """Detokenises rows and appends them, in the order in which they come.

    To be used with `with`, at whose end all is written.

    Args:
        files: What to append to; nobody else does meanwhile.
        tokenizer: The target's.
        room: Rows that may wait.
    """

    def __init__(self, files: ShardFiles, tokenizer: PreTrainedTokenizerBase, room: int) -> None:
        self._files, self._tokenizer = files, tokenizer
        self._rows: queue.Queue[Row | None] = queue.Queue(maxsize=room)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="lvspec-write", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._rows.put(None)
        self._thread.join()
        if error is None:
            self._check()

    def put(self, row: Row) -> None:
        """Hand over a row, as soon as there is room.

        Raises:
            NotWritten: An earlier one could not be written.
        """
        self._check()
        self._rows.put(row)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        while (row := self._rows.get()) is not None:
            if self._error is not None:
                continue  # rows behind one that is missing would be too
            try:
                if row["tokens"] is not None:
                    text = self._tokenizer.decode(row["tokens"], skip_special_tokens=True)
                    row["caption"] = text.strip()
                self._files.add(row)
            except Exception as error:
                self._error = error
