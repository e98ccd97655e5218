"""What scripts about a trained pair begin with: its options, the pair, clips, its policy."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import script
from pairs.choice import choose

from lvspec.models.loading import Pair
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.evaluation import Clip
from lvspec.shapes.tasks import Task


@dataclass(frozen=True)
class Trained:
    """A pair and what it was trained to do; a folder's name is its last part."""

    name: str
    task: Task
    pair: Pair

    def clips(self, split: str, count: int) -> list[Clip]:
        """Written as MP4 files, read back and removed."""
        with tempfile.TemporaryDirectory() as folder:
            return self.task.make_clips(self.pair, split, count, Path(folder))

    def policies(self) -> dict[str, AcceptancePolicy | None]:
        """Those that most tables compare; None is autoregression."""
        strict = AcceptancePolicy.strict()
        return {"autoregression": None, "strict": strict, "lvspec": AcceptancePolicy.lvspec()}


def parser_of(doc: str, *, clips: int) -> argparse.ArgumentParser:
    """For a script with this docstring; with `--clips`, `--threads` and `--json`."""
    parser = script.parser_of(doc)
    parser.add_argument("--clips", type=int, default=clips)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    return parser


def add_pair(parser: argparse.ArgumentParser) -> None:
    """The option `--pair`, for scripts that take any."""
    parser.add_argument("--pair", default="embedded", help="embedded (default), real or a folder")


def begin(
    parser: argparse.ArgumentParser, name: str = "embedded", **options: Any
) -> tuple[argparse.Namespace, Trained]:
    """The options of the script, and the pair that they name, or the one of this name.

    Args:
        parser: Of `parser_of`.
        name: The pair of a script without `--pair`.
        options: For the function that loads the pair.
    """
    arguments = script.begin(parser)
    torch.set_num_threads(arguments.threads)
    name = getattr(arguments, "pair", name)
    try:
        task = choose(name)
    except ValueError as error:
        parser.error(str(error))
    return arguments, Trained(Path(name).name, task, task.load(**options))
