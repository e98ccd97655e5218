"""What every kernel costs on real chips, without one: registers, shared memory, instructions.

    python bench/budget.py             compile every launch and compare with the committed table
    python bench/budget.py --table     print it
    python bench/budget.py --update    write the table of the installed triton version

The launchers of `lvspec.kernels` run on tensors without data; their launches are recorded and
compiled for sm_80, sm_90 and sm_100 as they would be there. Whatever the triton version, nothing
may spill, a program's shared memory must fit, and a dot product of 16-bit numbers must be on the
tensor cores with its operands fetched asynchronously. Besides, where `bench/budgets/` has a table
of this triton version (code generation differs between versions), registers, shared memory and the
bytes of the tensors that a launch is given may not grow, nor occupancy fall.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import subprocess
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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lvspec.kernels import launch

BUDGETS = Path(__file__).with_name("budgets")

Launch = tuple[Any, dict[str, Any]]  # a kernel and what it is launched with


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


class _Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self._launches.append((self._kernel, arguments))


@contextlib.contextmanager
def recording(device_class: str) -> Iterator[list[Launch]]:
    """Launches of every kernel as on a device of this class; nothing is launched."""
    launches: list[Launch] = []
    replaced = [(launch, "device_class", launch.device_class)]
    for operation in {operation for operation, _, _ in CALLS}:
        module = importlib.import_module(f"lvspec.kernels.{operation}")
        for name, value in vars(module).items():
            if name.endswith("_kernel"):
                replaced.append((module, name, value))
    try:
        launch.device_class = lambda device: device_class
        for module, name, value in replaced[1:]:
            setattr(module, name, _Recorder(value, launches))
        yield launches
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def launches_of(operation: str, arguments: tuple[Any, ...], device_class: str) -> list[Launch]:
    """What the launcher of an operation launches for these arguments."""
    with recording(device_class) as launches:
        module = importlib.import_module(f"lvspec.kernels.{operation}")
        getattr(module, operation)(*arguments)
    return launches


def compile_launch(recorded: Launch, capability: int) -> dict[str, int]:
    """Compile a recorded launch for sm_`capability` and count what came out."""
    kernel, given = recorded
    arguments = dict(given)
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and _is_one(value)):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = _type_name(value)
        aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if aligned and specialized:
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    ptx = compiled.asm["ptx"]
    registers, stack = _resources(compiled.asm["cubin"])
    return {
        "num_warps": options["num_warps"],
        "num_stages": options["num_stages"],
        "registers": registers,
        "spilled": stack,
        "shared": compiled.metadata.shared,
        "mma.sync": ptx.count("mma.sync"),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "cp.async": len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
    }


def occupancy(figures: dict[str, int], chip: Chip) -> int:
    """Programs that are on a multiprocessor at a time."""
    threads = 32 * figures["num_warps"]
    registers = -(-figures["registers"] // 8) * 8 * threads
    return min(
        chip.programs,
        chip.threads // threads,
        chip.registers // registers,
        chip.shared_in_all // (figures["shared"] + 1024),
    )


def _is_one(value: Any) -> bool:
    return type(value) is int and value == 1


def _type_name(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPE_NAMES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


_TYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack a thread, which is where spilled ones go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {done.stdout}{done.stderr}")
    return int(found[1]), int(found[2])


def measure(job: tuple[int, str]) -> list[tuple[str, dict[str, int]]]:
    """Figures of every kernel of one call on one device class, by a name for each."""
    index, device_class = job
    operation, label, make = CALLS[index]
    arguments, capability = make(device_class)
    if arguments is None:
        return []
    results = []
    for recorded in launches_of(operation, arguments, device_class):
        figures = compile_launch(recorded, capability)
        figures["occupancy"] = occupancy(figures, CHIPS[device_class])
        tensors = [x for x in recorded[1].values() if isinstance(x, torch.Tensor)]
        figures["bytes"] = sum(x.numel() * x.element_size() for x in tensors)
        name = f"{device_class} {operation}.{recorded[0].__name__} {label}"
        results.append((name, figures))
    return results


def measure_all(processes: int, only: str = "") -> dict[str, dict[str, int]]:
    """Figures of everything, or of the calls whose name has `only` in it."""
    jobs = [
        (index, device_class)
        for device_class in CHIPS
        for index, (operation, label, _) in enumerate(CALLS)
        if only in f"{device_class} {operation} {label}"
    ]
    with ProcessPoolExecutor(processes) as pool:
        parts = list(pool.map(measure, jobs))
    return {name: figures for part in parts for name, figures in part}


def violations(name: str, figures: dict[str, int]) -> list[str]:
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
)


def regressions(figures: dict[str, int], budget: dict[str, int]) -> list[str]:
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


def table(results: dict[str, dict[str, int]]) -> str:
    """One line a kernel."""
    fields = list(next(iter(results.values())))
    width = max(map(len, results))
    lines = ["  ".join(["kernel".ljust(width), *fields])]
    for name, figures in results.items():
        cells = [str(figures[field]).rjust(len(field)) for field in fields]
        lines.append("  ".join([name.ljust(width), *cells]))
    return "\n".join(lines)


def committed() -> tuple[Path, dict[str, dict[str, int]] | None]:
    """Where the table of the installed triton version is, and the table if there is one."""
    version = ".".join(triton.__version__.split(".")[:2])
    path = BUDGETS / f"triton-{version}.json"
    return path, json.loads(path.read_text()) if path.exists() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="calls with this in their name; no comparing")
    options = parser.parse_args()

    results = measure_all(options.processes, options.only)
    if options.table:
        print(table(results))
    problems = [f"{name}: {text}" for name in results for text in violations(name, results[name])]
    path, budget = committed()
    if options.only:
        budget = None
    elif options.update and not problems:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    elif budget is not None:
        for name in sorted(results.keys() - budget.keys()):
            problems.append(f"{name}: not in {path.name}; run with --update")
        for name in sorted(budget.keys() - results.keys()):
            problems.append(f"{name}: in {path.name}, but no such launch; run with --update")
        for name in sorted(results.keys() & budget.keys()):
            problems += [f"{name}: {text}" for text in regressions(results[name], budget[name])]
    compared = (
        f"compared with {path.name}" if budget else f"there is no {path.name} to compare with"
    )
    print(f"triton {triton.__version__}: {len(results)} kernels compiled; {compared}")
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
