"""The `lvspec` command: finds the sub-command, and turns what goes wrong into a line and a code.

Exit codes: 0 all done; 1 some of it, or an error of ours; 2 bad input; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lvspec import __version__
from lvspec.commands import say, say_progress

COMMANDS = {
    "generate": ("lvspec.commands.generate", "caption videos with a target and a draft"),
    "info": ("lvspec.commands.info", "versions, backends and devices, and why one is missing"),
    "demo": ("lvspec.shapes.demo", "caption held-out clips with the embedded pair"),
}
"""Name: (module with `add_parser(subparsers)`, which sets `func`; what it does)."""


class _Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help explains)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lvspec` with these arguments; None is those of the process.

    With LVSPEC_DEBUG=1 in the environment, errors keep their traceback.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    say_progress()
    try:
        arguments = _parser(words).parse_args(words)
        return arguments.func(arguments)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:
        # Whoever read stdout has left; without this Python complains once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("LVSPEC_DEBUG") == "1":
            raise
        if isinstance(error, (ValueError, OSError)):
            say(error, kind="error")
            return 2
        say(f"{type(error).__name__}: {error} (LVSPEC_DEBUG=1 shows where)", kind="error")
        return 1


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the options of the chosen sub-command only: the others are not imported."""
    parser = _Parser(prog="lvspec", description="Loosely speculative decoding of Video-LLMs.")
    parser.add_argument("--version", action="version", version=f"lvspec {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        if name == chosen:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser
