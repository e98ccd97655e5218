"""How a script of this folder begins and ends: its options, its table, its JSON."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from lvspec.environment import check_json_path, environment, write_json


def parser_of(doc: str) -> argparse.ArgumentParser:
    """For a script with this docstring; with `--json`."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options. Whatever is wrong with `--json` ends the script here, before any work."""
    arguments = parser.parse_args()
    if arguments.json:
        try:
            check_json_path(arguments.json)
        except OSError as error:
            parser.error(str(error))
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    return arguments


def finish(
    arguments: argparse.Namespace, figures: dict[str, Any], device: torch.device | str = "cpu"
) -> None:
    """Write the figures and the environment of the run to `--json`, if that was given."""
    if arguments.json:
        write_json(arguments.json, {**figures, "environment": environment(device)})


def of_target(row: dict[str, Any]) -> str:
    """The fidelity of a row of `MethodResult.summary`: attributes and whole captions.

    A target that has nothing right leaves nothing to be relative to.
    """
    fidelity = row["fidelity"]
    parts = ((fidelity["attributes"], ".2%"), (fidelity["captions"], ".1%"))
    return " / ".join("-" if share is None else format(share, form) for share, form in parts)


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None
) -> None:
    """Names in the first column, figures in the others."""
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
