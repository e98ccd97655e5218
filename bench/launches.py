"""Kernels of an iteration of a real pair, counted without a GPU.

    python bench/launches.py [--pair qwen-7b-3b ...] [--gamma 12] [--fuse none] [--json FILE]

An iteration at real widths runs on tensors without data (`pairs/without_data.py`), with one and two
layers in each model, from which follows what it is with all of them. Every operation that PyTorch
dispatches counts as a kernel, views and empty tensors do not, and one of lvspec's as many as Triton
launches for it. A library may launch more for an operation, as a matrix product of few rows may be
two kernels: what a GPU launches is in `bench/profile_step.py`, which puts this beside it.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from measuring import script
from pairs.pairs import PAIRS, REAL, Pair
from pairs.without_data import run_iteration

from lvspec.config import Fuse

Parts = dict[str, dict[str, int]]

EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")
CONTEXT = 1024
"""Of the counted iterations: how long a prompt is changes no number of launches."""


@dataclass(frozen=True)
class Counted:
    """Kernels of one iteration of a pair.

    Attributes:
        kernels: By name.
        early: How many of them have a launch before the one ahead has ended (`kernels/launch.py`).
        parts: As `DecodeStats.parts`, of both models.
    """

    kernels: Counter[str]
    early: int
    parts: Parts

    @property
    def total(self) -> int:
        return self.kernels.total()


@dataclass(frozen=True)
class Launches:
    """Kernels of an iteration, and of one of autoregression.

    Attributes:
        target_layer: Of one decoder layer of the target in the verify pass.
        draft_layer: Of one of the draft in a pass of one slot.
        alone_layer: The same of the target, without a draft.
        iteration: In all, with all passes and layers.
        early: Those of them as in `Counted`.
        alone: A token of the target without a draft.
        alone_early: Those of them as in `Counted`.
        by_name: Those of the iteration.
        parts: As `DecodeStats.parts`, of both models.
    """

    target_layer: int
    draft_layer: int
    alone_layer: int
    iteration: int
    early: int
    alone: int
    alone_early: int
    by_name: dict[str, int]
    parts: Parts


def is_launched(function: Any) -> bool:
    """Whether an operation of torch's writes a tensor: a view or an empty one writes nothing."""
    name = function.overloadpacket.__name__
    if function.namespace != "aten" or name in (*EMPTY, "_unsafe_view"):
        return False
    aliases = [returned.alias_info for returned in function._schema.returns]
    return not any(alias is not None and not alias.is_write for alias in aliases)


def count(pair: Pair, *, drafts: bool = True, **fields: Any) -> Counted:
    """Of one iteration of a pair as it is; `fields` are of `DecodeConfig`."""
    counts: Counter[str] = Counter()
    early = []

    def seen(function: Any) -> None:
        if is_launched(function):
            counts[function.overloadpacket.__name__] += 1

    def launched(kernel: Any, grid: Any, arguments: Any) -> None:
        counts[kernel.__name__] += 1
        if "launch_pdl" in arguments:
            early.append(kernel)

    options = {"launched": launched, "seen": seen, "drafts": drafts}
    parts = run_iteration(pair, context=CONTEXT, **options, **fields)
    return Counted(counts, len(early), parts)


def with_layers(pair: Pair, target: int, draft: int) -> Pair:
    """The pair cut to so many layers."""
    return replace(
        pair, target=pair.target.with_layers(target), draft=pair.draft.with_layers(draft)
    )


@functools.cache
def launches_of(pair: Pair, gamma: int = 12, fuse: Fuse = "kernels") -> Launches:
    """Of a pair with all its layers."""
    one, target, draft = (
        count(with_layers(pair, *layers), gamma=gamma, fuse=fuse)
        for layers in ((1, 1), (2, 1), (1, 2))
    )
    alone, deeper = (
        count(with_layers(pair, layers, 1), drafts=False, fuse=fuse) for layers in (1, 2)
    )
    more = {"target": pair.target.num_layers - 1, "draft": pair.draft.num_layers - 1}

    def whole(first: int, with_target: int, with_draft: int) -> int:
        more_of_draft = more["draft"] * (with_draft - first)
        return first + more["target"] * (with_target - first) + more_of_draft

    by_name = {
        name: whole(*(found.kernels[name] for found in (one, target, draft)))
        for name in {*one.kernels, *target.kernels, *draft.kernels}
    }
    parts = {
        role: {
            kind: number + more[role] * (two.parts[role][kind] - number)
            for kind, number in one.parts[role].items()
        }
        for role, two in (("target", target), ("draft", draft))
    }
    return Launches(
        target_layer=target.total - one.total,
        draft_layer=(draft.total - one.total) // gamma,
        alone_layer=deeper.total - alone.total,
        iteration=sum(by_name.values()),
        early=whole(one.early, target.early, draft.early),
        alone=whole(alone.total, deeper.total, alone.total),
        alone_early=whole(alone.early, deeper.early, alone.early),
        by_name=dict(Counter(by_name).most_common()),
        parts=parts,
    )


def main() -> int:
    parser = script.parser_of(__doc__)
    parser.add_argument("--pair", nargs="+", choices=PAIRS, default=REAL[:4], dest="pairs")
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--fuse", choices=get_args(Fuse), default="kernels")
    options = script.begin(parser)
    results = {}
    for name in options.pairs:
        found = launches_of(PAIRS[name], options.gamma, options.fuse)
        results[name] = asdict(found)
        print(
            f"{PAIRS[name].label}, gamma {options.gamma}: {found.iteration} kernels an iteration "
            f"({found.target_layer} a layer of the target, {found.draft_layer} of the draft), "
            f"{found.alone} a token alone; {found.early} may be launched early"
        )
        print("    " + ", ".join(f"{kernel} {count}" for kernel, count in found.by_name.items()))
    script.finish(options, {"gamma": options.gamma, "fuse": options.fuse, "pairs": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
