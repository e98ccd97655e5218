"""Clip after clip that fails with the same words: then it is not about the clips."""

from __future__ import annotations

ALIKE = 10
"""Clips in a row that fail with the same error before somebody acts."""


class Pattern:
    """Counts rows in a row that fail alike."""

    def __init__(self) -> None:
        self._count = 0
        self._last: str | None = None

    def add(self, error: str | None, video: str) -> str | None:
        """Count a row.

        Args:
            error: Its error.
            video: Its video: the same words about another file are the same error.

        Returns:
            The error in which this one is the `ALIKE`th in a row; else None.
        """
        if error is not None:
            error = error.replace(video, "the video")
        self._count = self._count + 1 if error == self._last else 1
        self._last = error
        return error if error is not None and self._count == ALIKE else None
