"""Sub-commands of `lvspec`, one a module with `add_parser`, and how they speak to the user."""

import logging
import os
import sys


def say(message: object, *, kind: str | None = None) -> None:
    """One line on stderr: `lvspec: error: …`. Line breaks within the message become spaces."""
    words = " ".join(str(message).split())
    print(": ".join(part for part in ("lvspec", kind, words) if part), file=sys.stderr, flush=True)


def hush() -> None:
    """Of several processes the first one alone speaks: from now on this one says nothing."""
    sys.stdout = sys.stderr = open(os.devnull, "w")


def say_progress() -> None:
    """From now on what the library logs is said too: that a graph is captured, for instance."""
    logger = logging.getLogger("lvspec")
    if not any(isinstance(handler, _Say) for handler in logger.handlers):
        logger.addHandler(_Say())
        logger.setLevel(logging.INFO)


class _Say(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())
