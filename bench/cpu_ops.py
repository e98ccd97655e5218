"""Every operation on one CPU thread: C++ beside the PyTorch reference and the peers.

    python bench/cpu_ops.py [--json FILE]

At the embedded pair's sizes and at those of Qwen2.5-VL-3B with 4k context. Results are checked
before they are timed; figures are medians of one process. `share` is the bytes that the operation
must touch over its time, as a part of what a copy of 64 MiB moves per second in the same process:
inputs that fit a cache can be above 100 %.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measuring import script, timing
from ops import case_inputs, cases, checks, peers
from ops.cases import Case, Shape

from lvspec import ops, reference

EMBEDDED = Shape("embedded", 4, 2, 64, 12, 256, 1024)
CPU = torch.device("cpu")
TOP_K = 5
LVSPEC = case_inputs.POLICIES["lvspec"]

Call = Callable[[], Any]
Row = tuple[str, Case, torch.dtype, Callable[[Any], Call], int, dict[str, Call]]


def verify_attention(case: Case, dtype: torch.dtype) -> Row:
    inputs = case_inputs.verify_inputs(case, CPU, dtype)
    checks.check_verify_attention(inputs, ops.verify_attention(*inputs[:6]))
    others = {name: peers.ATTENTION[name](case, inputs) for name in ("sdpa grouped",)}
    call = lambda room: lambda: room.verify_attention(*inputs[:6])
    return "verify_attention", case, dtype, call, case_inputs.verify_bytes(case, inputs), others


def logit_stats(case: Case, dtype: torch.dtype) -> Row:
    logits = case_inputs.logits_of(case, CPU, dtype)
    checks.check_logit_stats(logits, TOP_K, ops.logit_stats(logits, top_k=TOP_K))
    others = {"torch": peers.LOGIT_STATS["torch"](case, logits, TOP_K)}
    call = lambda room: lambda: room.logit_stats(logits, top_k=TOP_K)
    return "logit_stats", case, dtype, call, case_inputs.logits_bytes(case, logits, TOP_K), others


def accept(case: Case, dtype: torch.dtype) -> Row:
    inputs = case_inputs.accept_inputs(case, CPU, dtype)
    checks.check_accept(inputs, LVSPEC, ops.accept(*inputs, LVSPEC))
    call = lambda room: lambda: room.accept(*inputs, LVSPEC)
    return "accept", case, dtype, call, case_inputs.accept_bytes(case, inputs), {}


def gate(case: Case, dtype: torch.dtype) -> Row:
    inputs = case_inputs.gate_inputs(case, CPU, dtype)
    checks.check_gate(inputs, ops.gate(*inputs))
    call = lambda room: lambda: room.gate(*inputs)
    return "gate", case, dtype, call, case_inputs.gate_bytes(case, inputs), {}


def accept_sampled(case: Case, dtype: torch.dtype) -> Row:
    inputs = case_inputs.sampled_inputs(case, CPU, dtype)
    checks.check_accept_sampled(inputs, ops.accept_sampled(*inputs))
    others = {"torch": peers.SAMPLED["torch"](case, inputs)}
    call = lambda room: lambda: room.accept_sampled(*inputs)
    return "accept_sampled", case, dtype, call, case_inputs.sampled_bytes(case, inputs), others


def commit_kv(case: Case, dtype: torch.dtype) -> Row:
    inputs = case_inputs.commit_inputs(case, CPU, dtype)
    before = [rows.clone() for rows in case_inputs.committed_rows(case, inputs)]
    ops.commit_kv(*inputs)
    checks.check_commit_kv(inputs, before, case_inputs.committed_rows(case, inputs))
    call = lambda room: lambda: room.commit_kv(*inputs)
    return "commit_kv", case, dtype, call, case_inputs.commit_bytes(case, inputs), {}


def visual_importance(case: Case, dtype: torch.dtype) -> Row:
    inputs = case_inputs.importance_inputs(case, CPU, dtype)
    checks.check_visual_importance(inputs, ops.visual_importance(*inputs))
    call = lambda room: lambda: room.visual_importance(*inputs)
    return "visual_importance", case, dtype, call, case_inputs.importance_bytes(case, inputs), {}


def expand_tree(case: Case, dtype: torch.dtype) -> Row:
    inputs = case_inputs.expand_inputs(case, CPU, dtype)
    width, top_k = checks.expand_width(inputs)
    got = ops.expand_tree(*inputs, width=width, top_k=top_k)
    checks.check_expand_tree(inputs, top_k, got)
    call = lambda room: lambda: room.expand_tree(*inputs, width=width, top_k=top_k)
    return "expand_tree", case, dtype, call, case_inputs.expand_bytes(case, inputs), {}


def rows() -> list[Row]:
    """What is measured."""
    found = []
    for shape, context, slots, dtypes in (
        (EMBEDDED, 128, 13, (torch.float32,)),
        (cases.QWEN_3B, 4096, 9, (torch.bfloat16, torch.float32)),
    ):
        for dtype in dtypes:
            chain, tree = (Case(shape, context, slots, 1, is_tree=flag) for flag in (False, True))
            found.append(verify_attention(Case(shape, context, 1, 1), dtype))
            found.append(verify_attention(chain, dtype))
            found.append(logit_stats(chain, dtype))
            found.append(accept(chain, dtype))
            found.append(accept(tree, dtype))
            found.append(accept_sampled(chain, dtype))
            found.append(gate(chain, dtype))
            found.append(commit_kv(tree, dtype))
            found.append(visual_importance(chain, dtype))
            found.append(expand_tree(Case(shape, 0, 8, 1, is_tree=True), dtype))
    return found


def main() -> None:
    options = script.begin(script.parser_of(__doc__))
    torch.set_num_threads(1)
    if ops.active_backend("cpu") != "cpp":
        raise SystemExit(f"expected the cpp backend: {ops.backends()['cpp'].reason}")
    bandwidth = timing.copy_bandwidth(CPU)
    results = []
    print("| operation | case | C++ us | reference us | times | share | peers, us |")
    print("|---|---|---:|---:|---:|---:|---|")
    for name, case, dtype, call, size, others in rows():
        microseconds = {
            who: 1e3 * timing.measure(run, CPU).median_ms
            for who, run in {"cpp": call(ops), "reference": call(reference), **others}.items()
        }
        ours, theirs = microseconds["cpp"], microseconds["reference"]
        share = size / (ours / 1e6) / bandwidth
        label = f"{case} {str(dtype).removeprefix('torch.')}"
        beside = ", ".join(f"{who} {microseconds[who]:.1f}" for who in others)
        print(
            f"| `{name}` | {label} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.1f} "
            f"| {share:.0%} | {beside} |",
            flush=True,
        )
        results.append(
            {"operation": name, "case": label, "bytes": size, "share": share, **microseconds}
        )
    print(f"\na copy of 64 MiB moves {bandwidth / 1e9:.1f} GB/s, read and written")
    script.finish(options, {"copy_gb_per_s": bandwidth / 1e9, "rows": results})


if __name__ == "__main__":
    main()
