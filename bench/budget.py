"""What every kernel costs on real chips, without one: registers, shared memory, instructions.

    python bench/budget.py             compile what has changed and compare with the committed table
    python bench/budget.py --all       compile every launch
    python bench/budget.py --table     print it
    python bench/budget.py --update    write the table of the installed triton version

The launchers of `lvspec.kernels` run on tensors without data; their launches are kept and
compiled for sm_80, sm_90 and sm_100 as they would be there. Whatever the triton version, nothing
may spill, a program's shared memory must fit, and a dot product of 16-bit numbers must be on the
tensor cores with its operands fetched asynchronously. Besides, where `bench/budgets/` has a table
of this triton version (code generation differs between versions), registers, shared memory and the
bytes of the tensors that a launch is given may not grow, nor occupancy fall. A row of that table
has a key of all that its figures depend on (`ops/compiling.py`); only where it differs is compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: nothing is run here
# A cache of its own; and fused multiply-add as ever, whose default changes in triton 3.10.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir(), "lvspec-budget-cache")))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from ops.budget_calls import CALLS
from ops.compiling import Compilation, Figures, Launch

import lvspec.kernels
from lvspec.kernels import launch

BUDGETS = Path(__file__).with_name("budgets")

Job = tuple[int, str]  # a call, by its index, on a device class
Table = dict[str, dict[str, Any]]  # figures and key of a kernel, by its name


@dataclass(frozen=True)
class Chip:
    """Limits of a multiprocessor."""

    shared: int  # bytes one program may have
    shared_in_all: int  # bytes for all its programs, each of which takes 1 KiB besides its own
    threads: int = 2048
    registers: int = 65536
    programs: int = 32


CHIPS = {
    "sm80": Chip(99 * 1024, 164 * 1024),
    "sm90": Chip(227 * 1024, 228 * 1024),
    "sm100": Chip(227 * 1024, 228 * 1024),
}
"""A program of sm80's tables may have what the smallest chip has that they serve."""

TENSOR_CORES = {"sm80": "mma.sync", "sm90": "wgmma", "sm100": "tcgen05"}
"""The widest matrix instructions; tiles of fewer than 64 rows take mma.sync on every chip."""


class _Keeper:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self._launches.append((self._kernel, arguments))


@contextlib.contextmanager
def keeping_launches(device_class: str) -> Iterator[list[Launch]]:
    """Launches of every kernel as on a device of this class; nothing is launched."""
    launches: list[Launch] = []
    replaced = [(launch, "device_class", launch.device_class)]
    for found in pkgutil.iter_modules(lvspec.kernels.__path__):
        module = importlib.import_module(f"lvspec.kernels.{found.name}")
        for name, value in vars(module).items():
            if name.endswith("_kernel"):
                replaced.append((module, name, value))
    try:
        launch.device_class = lambda device: device_class
        for module, name, value in replaced[1:]:
            setattr(module, name, _Keeper(value, launches))
        yield launches
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def launches_of(operation: str, arguments: tuple[Any, ...], device_class: str) -> list[Launch]:
    """What the launcher of an operation launches for these arguments."""
    with keeping_launches(device_class) as launches:
        module = importlib.import_module(f"lvspec.kernels.{operation}")
        getattr(module, operation)(*arguments)
    return launches


def occupancy(figures: Figures, chip: Chip) -> int:
    """Programs that are on a multiprocessor at a time."""
    threads = 32 * figures["num_warps"]
    registers = -(-figures["registers"] // 8) * 8 * threads
    return min(
        chip.programs,
        chip.threads // threads,
        chip.registers // registers,
        chip.shared_in_all // (figures["shared"] + 1024),
    )


@dataclass(frozen=True)
class Row:
    """A kernel of one call on one device class, and the key of its figures."""

    name: str
    job: Job
    compilation: Compilation
    key: str
    size: int  # bytes of the tensors that it is given


def rows_of(job: Job) -> list[Row]:
    """The kernels that one call launches on one device class, not compiled."""
    index, device_class = job
    operation, label, make = CALLS[index]
    arguments, capability = make(device_class)
    if arguments is None:
        return []
    rows = []
    for launched in launches_of(operation, arguments, device_class):
        kernel, given = launched
        name = f"{device_class} {operation}.{kernel.__name__} {label}"
        compilation = Compilation(launched, capability)
        size = sum(x.numel() * x.element_size() for x in given.values() if torch.is_tensor(x))
        rows.append(Row(name, job, compilation, compilation.key(), size))
    return rows


def all_rows(only: str = "") -> list[Row]:
    """Those of everything, or of the calls whose name has `only` in it."""
    return [
        row
        for device_class in CHIPS
        for index, (operation, label, _) in enumerate(CALLS)
        if only in f"{device_class} {operation} {label}"
        for row in rows_of((index, device_class))
    ]


def compile_some(work: tuple[Job, set[str]]) -> dict[str, Figures]:
    """Figures of the kernels of a call that have one of these keys, by key."""
    job, keys = work
    return {row.key: row.compilation.figures() for row in rows_of(job) if row.key in keys}


def compile_all(rows: list[Row], processes: int) -> dict[str, Figures]:
    """Figures by key, of which each is compiled once."""
    work: dict[Job, set[str]] = {}
    for row in {row.key: row for row in rows}.values():
        work.setdefault(row.job, set()).add(row.key)
    with ProcessPoolExecutor(processes) as pool:
        parts = list((pool.map if processes > 1 else map)(compile_some, work.items()))
    return {key: figures for part in parts for key, figures in part.items()}


def measure_all(rows: list[Row], known: dict[str, Figures], processes: int) -> tuple[Table, int]:
    """Figures of these rows by name, and how many had to be compiled: whose key is not known."""
    changed = [row for row in rows if row.key not in known]
    compiled = known | (compile_all(changed, processes) if changed else {})
    results = {}
    for row in rows:
        figures = compiled[row.key]
        chip = CHIPS[row.job[1]]
        rest = {"occupancy": occupancy(figures, chip), "bytes": row.size}
        results[row.name] = {**figures, **rest, "key": row.key}
    return results, len(changed)


def violations(name: str, figures: dict[str, Any]) -> list[str]:
    """What no version of triton may do."""
    device_class, kernel, *words = name.split(" ")
    found = []
    if figures["spilled"]:
        found.append(f"spills: {figures['spilled']} bytes of stack, expected 0")
    limit = CHIPS[device_class].shared
    if figures["shared"] > limit:
        found.append(f"shared memory: {figures['shared']} bytes, expected at most {limit}")
    if kernel in _DOT_KERNELS and "float32" not in words:
        tensor_cores = "mma.sync" if "few-rows" in words else TENSOR_CORES[device_class]
        if not figures[tensor_cores]:
            found.append(f"no {tensor_cores} instructions")
        if not figures["cp.async"]:
            found.append("no asynchronous copies")
    return found


_DOT_KERNELS = (
    "verify_attention.attend_kernel",
    "visual_importance.visual_importance_kernel",
    "scaled_linear.scaled_linear_kernel",
    "norm_linear.few_rows_kernel",
    "norm_gated_linear.few_rows_kernel",
    "linear_add_.few_rows_kernel",
)


def regressions(figures: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    """What is worse than in the committed table."""
    found = []
    for field in ("registers", "shared", "bytes"):
        if figures[field] > budget.get(field, 0):
            found.append(f"{field}: {figures[field]}, expected at most {budget.get(field)}")
    for field in ("occupancy", "cp.async", "mma.sync", "wgmma", "tcgen05"):
        worse = figures[field] < budget[field] if field == "occupancy" else False
        lost = budget[field] > 0 and figures[field] == 0
        if worse or lost:
            found.append(f"{field}: {figures[field]}, expected {budget[field]}")
    return found


def table(results: Table) -> str:
    """One line a kernel."""
    fields = [field for field in next(iter(results.values())) if field != "key"]
    width = max(map(len, results))
    lines = ["  ".join(["kernel".ljust(width), *fields])]
    for name, figures in results.items():
        cells = [str(figures[field]).rjust(len(field)) for field in fields]
        lines.append("  ".join([name.ljust(width), *cells]))
    return "\n".join(lines)


def committed() -> tuple[Path, Table | None]:
    """Where the table of the installed triton version is, and the table if there is one."""
    version = ".".join(triton.__version__.split(".")[:2])
    path = BUDGETS / f"triton-{version}.json"
    return path, json.loads(path.read_text()) if path.exists() else None


def write(path: Path, results: Table) -> None:
    """A line a kernel."""
    lines = [f" {json.dumps(name)}: {json.dumps(figures)}" for name, figures in results.items()]
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def compare(results: Table, budget: Table, file: str) -> list[str]:
    """What is worse than in the committed table, and what is only in one of them."""
    problems = []
    for name in sorted(results.keys() - budget.keys()):
        problems.append(f"{name}: not in {file}; run with --update")
    for name in sorted(budget.keys() - results.keys()):
        problems.append(f"{name}: in {file}, but no such launch; run with --update")
    for name in sorted(results.keys() & budget.keys()):
        problems += [f"{name}: {text}" for text in regressions(results[name], budget[name])]
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="compile what has not changed, too")
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="calls with this in their name; no comparing")
    options = parser.parse_args(arguments)

    path, budget = committed()
    # A row without a key is older than keys: it is compared with, and compiled.
    rows = [] if options.all or budget is None else budget.values()
    known = {row["key"]: row for row in rows if "key" in row}
    results, num_compiled = measure_all(all_rows(options.only), known, options.processes)
    if options.table:
        print(table(results))
    problems = [f"{name}: {text}" for name in results for text in violations(name, results[name])]
    outcome = "not compared"
    if options.update and not options.only:
        outcome = f"{path.name} is as it was" if problems else f"written to {path.name}"
        if not problems:
            write(path, results)
    elif budget is None:
        outcome = f"there is no {path.name} to compare with"
    elif not options.only:
        problems += compare(results, budget, path.name)
        outcome = f"compared with {path.name}"
    counts = f"{len(results)} kernels, {num_compiled} compiled"
    print(f"triton {triton.__version__}: {counts}; {outcome}")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
