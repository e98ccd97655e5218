"""Sub-commands of `lvspec`, one a module with `add_parser`, and how they speak to the user."""

import sys


def say(message: object, *, kind: str | None = None) -> None:
    """One line on stderr: `lvspec: error: …`. Line breaks within the message become spaces."""
    words = " ".join(str(message).split())
    print(": ".join(part for part in ("lvspec", kind, words) if part), file=sys.stderr, flush=True)
