"""Which trained pair `--pair` means: one that lvspec knows by name, or a folder of a small one."""

from __future__ import annotations

from pathlib import Path

from pairs_small.pair import FACTS, small_task

from lvspec.shapes.tasks import TASKS, Task


def choose(name: str) -> Task:
    """The pair of this name, or the one that `bench/pairs_small/train.py` left in this folder.

    Raises:
        ValueError: It is neither, or the folder's recipe is not known.
    """
    if name in TASKS:
        return TASKS[name]
    if not (Path(name) / FACTS).is_file():
        raise ValueError(
            f"--pair: expected {', '.join(TASKS)} or a folder that bench/pairs_small/train.py has "
            f"finished, got {name}"
        )
    return small_task(Path(name))
