"""The `lvspec` command: finds the sub-command, and turns what goes wrong into a line and a code.

Exit codes: 0 all done; 1 some of it, or an error of ours; 2 bad input; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lvspec import __version__
from lvspec.cli.options import did_you_mean, unknown_options
from lvspec.cli.say import hush, say, say_progress
from lvspec.environment import NotWritten

COMMANDS = {
    "generate": ("lvspec.cli.generate", "caption videos with a target and a draft"),
    "caption": ("lvspec.cli.caption", "caption a folder or a manifest: resumable, in shards"),
    "calibrate": ("lvspec.cli.calibrate", "find settings that keep a stated fidelity"),
    "evaluate": ("lvspec.cli.evaluate", "methods side by side on your own videos"),
    "report": ("lvspec.cli.report", "a page that shows captions token by token, or an evaluation"),
    "info": ("lvspec.cli.info", "versions, backends and devices, and why one is missing"),
    "demo": ("lvspec.cli.demo", "caption held-out clips with the embedded pair"),
}
"""Name: (module with `add_parser(subparsers)`, which sets `func`; what it does)."""


class _Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help explains)")

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """Before another option is missed: what is missing may be misspelt."""
        known = self._option_string_actions
        for name in unknown_options(words, known):
            self.error(
                f"{name}: expected an option, got none of that name{did_you_mean(name, known)}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lvspec` with these arguments; None is those of the process.

    With LVSPEC_DEBUG=1 in the environment, errors keep their traceback.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if "--tensor-parallel" in words and os.environ.get("RANK", "0") != "0":
        hush()
    say_progress()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that is not UTF-8, or a word that the locale cannot spell, stops nothing.
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = _parse(words)
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
            return 1 if isinstance(error, NotWritten) else 2
        say(f"{type(error).__name__}: {error} (LVSPEC_DEBUG=1 shows where)", kind="error")
        return 1


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments; of the sub-commands only the chosen one is imported."""
    parser = _Parser(prog="lvspec", description="Loosely speculative decoding of Video-LLMs.")
    parser.add_argument("--version", action="version", version=f"lvspec {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    first = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    chosen = words[first] if first < len(words) else None
    for name, (module, summary) in COMMANDS.items():
        if name == chosen:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    parser.refuse_unknown(words[:first])
    if chosen is None:
        return parser.parse_args(words)
    if chosen not in COMMANDS:
        names = ", ".join(COMMANDS)
        parser.error(f"expected a command ({names}), got {chosen}{did_you_mean(chosen, COMMANDS)}")
    command = subparsers.choices[chosen]
    command.refuse_unknown(words[first + 1 :])
    arguments, rest = parser.parse_known_args(words)
    if rest:
        command.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments
