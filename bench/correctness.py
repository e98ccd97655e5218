"""Every operation on a device against lvspec.reference, at odd and at real sizes.

    python bench/correctness.py [--device cuda] [--set small odd usual] [--json FILE]

Exit code 1 if any result is wrong. What does not fit into the device's memory is left out, and said
to be. On CUDA most of the time is Triton's compilation of every variant: odd sizes, which need
little memory, go to several processes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from measuring import script
from ops import case_inputs, cases, checks
from ops.cases import Case
from ops.reasons import DoesNotFit, Wrong
from rich.console import Console
from rich.table import Table

from lvspec import ops


def _verify_attention(case: Case, inputs: case_inputs.VerifyInputs) -> None:
    got = ops.verify_attention(*inputs[:6], plan=inputs.plan)
    checks.check_verify_attention(inputs, got)
    checks.check_verify_attention(inputs, ops.verify_attention(*inputs[:6]))  # by the mask
    without = ops.verify_attention(*inputs[:6], plan=inputs.plan, scores=False)
    if not (torch.equal(without.out, got.out) and torch.equal(without.lse, got.lse)):
        raise Wrong("out, lse: expected the same bits without scores, got others")


def _logit_stats(case: Case, logits: torch.Tensor) -> None:
    for top_k in (1, 8, 16):
        checks.check_logit_stats(logits, top_k, ops.logit_stats(logits, top_k=top_k))


def _accept(case: Case, inputs: case_inputs.AcceptInputs) -> None:
    for policy in case_inputs.POLICIES.values():
        checks.check_accept(inputs, policy, ops.accept(*inputs, policy))


def _gate(case: Case, inputs: case_inputs.GateInputs) -> None:
    checks.check_gate(inputs, ops.gate(*inputs))


def _accept_sampled(case: Case, inputs: case_inputs.SampledInputs) -> None:
    checks.check_accept_sampled(inputs, ops.accept_sampled(*inputs))


def _commit_kv(case: Case, inputs: case_inputs.CommitInputs) -> None:
    before = [rows.clone() for rows in case_inputs.committed_rows(case, inputs)]
    ops.commit_kv(*inputs)
    checks.check_commit_kv(inputs, before, case_inputs.committed_rows(case, inputs))


def _visual_importance(case: Case, inputs: case_inputs.ImportanceInputs) -> None:
    checks.check_visual_importance(inputs, ops.visual_importance(*inputs))


def _expand_tree(case: Case, inputs: case_inputs.ExpandInputs) -> None:
    width, top_k = checks.expand_width(inputs)
    got = ops.expand_tree(*inputs, width=width, top_k=top_k)
    checks.check_expand_tree(inputs, top_k, got)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""At odd sizes; at real ones what models decode in."""

RUNS: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "verify_attention": (case_inputs.verify_inputs, _verify_attention),
    "logit_stats": (case_inputs.logits_of, _logit_stats),
    "accept": (case_inputs.accept_inputs, _accept),
    "accept_sampled": (case_inputs.sampled_inputs, _accept_sampled),
    "gate": (case_inputs.gate_inputs, _gate),
    "commit_kv": (case_inputs.commit_inputs, _commit_kv),
    "visual_importance": (case_inputs.importance_inputs, _visual_importance),
    "expand_tree": (case_inputs.expand_inputs, _expand_tree),
}


@torch.inference_mode()
def run(operation: str, case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One row: ok, wrong, error or left out, and why."""
    make, check = RUNS[operation]
    row = {"operation": operation, "case": str(case), "dtype": str(dtype).split(".")[1]}
    try:
        check(case, make(case, device, dtype))
        return {**row, "result": "ok", "reason": None}
    except (DoesNotFit, torch.OutOfMemoryError) as reason:
        return {**row, "result": "left out", "reason": str(reason)}
    except Wrong as reason:
        return {**row, "result": "wrong", "reason": str(reason)}
    except Exception as error:
        return {**row, "result": "error", "reason": f"{type(error).__name__}: {error}"}


Task = tuple[str, list[Case], torch.device, torch.dtype]


def run_task(task: Task) -> list[dict[str, Any]]:
    """Rows of cases that compile for each other: one operation, one shape, one type."""
    operation, chosen, device, dtype = task
    return [run(operation, case, device, dtype) for case in chosen]


def tasks(operations: list[str], sets: list[str], device: torch.device) -> Iterator[Task]:
    """Those of verify_attention, which compile longest, come first."""
    for operation, name in itertools.product(operations, sets):
        chosen = cases.odd_cases(operation) if name == "odd" else cases.cases(operation, name)
        by_shape: dict[str, list[Case]] = {}
        for case in chosen:
            by_shape.setdefault(case.shape.name, []).append(case)
        for dtype in (torch.bfloat16,) if name == "usual" else DTYPES:
            for mine in by_shape.values():
                yield operation, mine, device, dtype


def run_tasks(light: list[Task], heavy: list[Task], processes: int) -> Iterator[list[dict]]:
    """Rows of each task: the light ones in several processes, and the heavy ones behind them, one
    after the other: each may need much of the device's memory."""
    if processes > 1 and light:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
            yield from pool.map(run_task, light)
    else:
        yield from map(run_task, light)
    yield from map(run_task, heavy)


def summary(rows: list[dict[str, Any]]) -> Table:
    table = Table("operation", "dtype", "ok", "wrong", "error", "left out")
    for operation in RUNS:
        mine = [row for row in rows if row["operation"] == operation]
        for dtype in dict.fromkeys(row["dtype"] for row in mine):
            results = [row["result"] for row in mine if row["dtype"] == dtype]
            counts = [results.count(name) for name in ("ok", "wrong", "error", "left out")]
            table.add_row(operation, dtype, *map(str, counts))
    return table


def main() -> int:
    parser = script.parser_of(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--set", nargs="+", choices=["small", "odd", "usual"], dest="sets")
    parser.add_argument("--operations", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--processes", type=int, help="default: 1, on CUDA up to 12")
    arguments = script.begin(parser)
    device = arguments.device
    on_cuda = device.type == "cuda"
    sets = arguments.sets or (["small", "odd", "usual"] if on_cuda else ["small"])
    processes = arguments.processes or (min(12, os.cpu_count() or 1) if on_cuda else 1)
    start, rows = time.perf_counter(), []
    light = list(tasks(arguments.operations, [name for name in sets if name != "usual"], device))
    heavy = list(tasks(arguments.operations, [name for name in sets if name == "usual"], device))
    num_checks = sum(len(chosen) for _, chosen, _, _ in (*light, *heavy))
    facts = {"backend": ops.active_backend(device.type), "num_checks": num_checks}
    for found in run_tasks(light, heavy, processes):
        rows += found
        script.finish(arguments, {"rows": rows, **facts}, device)  # a kill leaves what there is

    console = Console()
    for row in rows:
        if row["result"] != "ok":
            words = [row[key] for key in ("operation", "case", "dtype", "result")]
            console.print(" ".join(words), row["reason"], sep=": ", soft_wrap=True, markup=False)
    console.print(summary(rows))
    console.print(f"{len(rows)} checks in {time.perf_counter() - start:.0f} s")
    return 1 if any(row["result"] in ("wrong", "error") for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
