"""lvspec report: a page that shows what was accepted, and why."""

from __future__ import annotations

import argparse
from pathlib import Path

from lvspec.cli.options import errors_by_option


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `report`."""
    summary = "one page that shows captions token by token, or an evaluation"
    parser = subparsers.add_parser("report", help=summary, description=summary)
    parser.set_defaults(func=run)
    add = parser.add_argument
    add(
        "file",
        metavar="FILE",
        help="what lvspec generate --trace --json wrote, or the JSONL of lvspec evaluate",
    )
    add("--out", metavar="PAGE", help="where the page goes (default: FILE with .html as its end)")
    add("--png", metavar="PICTURE", help="a picture of it too (needs matplotlib)")
    add(
        "--captions",
        nargs="+",
        default=[],
        metavar="WHICH",
        help="numbers from 1, or names of videos (default: all, token by token the first 12)",
    )
    add("--title", metavar="TEXT", help="of the page")


def run(arguments: argparse.Namespace) -> int:
    """Write the page, and say where it is.

    Raises:
        ImportError: Jinja2 or matplotlib is not installed.
        OSError, ValueError: Bad input, or the page cannot be written.
    """
    source = Path(arguments.file)
    if not source.exists():
        raise FileNotFoundError(f"FILE: expected a file, got {source}: no such file")
    if source.is_dir():
        inside = sorted(source.glob("*.jsonl"))
        hint = f" (perhaps {inside[0]})" if inside else ""
        raise IsADirectoryError(f"FILE: expected a file, got the folder {source}{hint}")
    out = Path(arguments.out) if arguments.out else source.with_suffix(".html")
    _check(source, out, arguments.png)

    from lvspec.reporting.report import report

    with errors_by_option({"captions": "--captions", "page": "--out", "png": "--png"}):
        report(source, out, png=arguments.png, captions=arguments.captions, title=arguments.title)
    for path in filter(None, (out, arguments.png)):
        print(path)
    return 0


def _check(source: Path, out: Path, png: str | None) -> None:
    """Refuse what cannot be written, before anything is read.

    Raises:
        OSError, ValueError: Names the option.
    """
    if png is not None and Path(png).resolve() == out.resolve():
        raise ValueError(f"--png: expected another file than --out, got {png}")
    for option, path in (("--out", out), ("--png", png)):
        if path is None:
            continue
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"{option}: expected the name of a file, got the folder {path}")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{option}: expected a name in an existing folder, got {path}")
        if path.resolve() == source.resolve():
            raise ValueError(f"{option}: expected another file than {source}, got the same")
