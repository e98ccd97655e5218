"""The short table of what the scripts of this folder measured.

    python bench/summary.py FILE.json ...

Takes the JSON of `pytest bench/bench_*.py --benchmark-json`, `correctness.py`, `end_to_end.py` and
`profile_step.py`. Microseconds: `limit` is bytes over the copy bandwidth of the same run, `ours` a
replayed CUDA graph (on the CPU a call), `calls` the same from Python, `share` limit over ours.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def microbenchmarks(document: dict[str, Any]) -> list[str]:
    facts = document["machine_info"]["lvspec"]
    limits, versions = facts["limits"], facts["environment"]
    lines = [
        f"{versions['device_name']}, torch {versions['torch']}, triton {versions['triton']}, "
        f"{facts['backend']}, commit {(versions['commit'] or '-')[:12]}: copy "
        f"{limits['copy_gb_per_s']:.0f} GB/s, empty launch {1e3 * limits['launch_ms']:.1f} us"
    ]
    operation = None
    for benchmark in document["benchmarks"]:
        info = benchmark["extra_info"]
        if info["operation"] != operation:
            operation = info["operation"]
            lines += ["", f"{operation:42} {_HEADINGS}  peers"]
        case = info["case"] + (f" {info['policy']}" if "policy" in info else "")
        figures = [_us(info["limit_ms"]), _us(info["median_ms"])]
        figures += [f"{_us(info['p20_ms'])}-{_us(info['p80_ms'])}", _us(info.get("calls_ms"))]
        figures += [f"{info['gb_per_s']:.0f}", f"{100 * info['share_of_copy']:.0f}%"]
        columns = " ".join(f"{text:>{width}}" for text, width in zip(figures, _WIDTHS))
        peers = [
            f"{name} {_us(peer['median_ms'])}{'*' if peer['how'] == 'calls' else ''}"
            for name, peer in info["peers"].items()
            if "median_ms" in peer
        ]
        lines.append(f"{case:42} {columns}  {', '.join(peers)}")
    missing = {
        f"{name}: {peer['unavailable']}"
        for benchmark in document["benchmarks"]
        for name, peer in benchmark["extra_info"]["peers"].items()
        if "unavailable" in peer
    }
    lines += ["", "* from Python, not captured"]
    return lines + [f"not measured: {reason}" for reason in sorted(missing)]


_WIDTHS = (8, 8, 15, 8, 6, 6)
_HEADINGS = " ".join(
    f"{name:>{width}}"
    for name, width in zip(("limit", "ours", "p20-p80", "calls", "GB/s", "share"), _WIDTHS)
)


def correctness(document: dict[str, Any]) -> list[str]:
    rows = document["rows"]
    lines = []
    for operation in dict.fromkeys(row["operation"] for row in rows):
        results = [row["result"] for row in rows if row["operation"] == operation]
        counts = [f"{results.count(name)} {name}" for name in dict.fromkeys(["ok", *results])]
        lines.append(f"{operation:20} {', '.join(counts)}")
    bad = [row for row in rows if row["result"] != "ok"]
    for row in bad[:20]:
        words = (row["operation"], row["case"], row["dtype"], row["result"], row["reason"])
        lines.append(" ".join(map(str, words)))
    return lines


def end_to_end(document: dict[str, Any]) -> list[str]:
    lines = [f"{'method':16} tokens/s speedup   tau captions"]
    for row in document["rows"]:
        lines.append(
            f"{row['method']:16} {row['tokens_per_s']:8.0f} {row['speedup']:6.2f}x "
            f"{row['tau']:5.2f} {row['captions']:8.1%}"
        )
    equal, clips = document["strict_equals_hf"], document["clips"]
    return [*lines, f"strict equals hf generate on {equal} of {clips} clips"]


def steps(document: dict[str, Any]) -> list[str]:
    lines = [
        f"{document['model']}, {document['layers']} layers, context {document['context']}",
        f"{'step':28} {'calls':>10} {'graph':>10}",
    ]
    for name, found in document["steps"].items():
        lines.append(f"{name:28} {_us(found['calls_ms']):>10} {_us(found['graph_ms']):>10}")
    return lines


def _us(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "-"
    value = 1e3 * milliseconds
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def describe(document: dict[str, Any]) -> list[str]:
    """The lines for one file, whichever script wrote it.

    Raises:
        ValueError: None of them did.
    """
    if "benchmarks" in document:
        return microbenchmarks(document)
    if "steps" in document:
        return steps(document)
    if "strict_equals_hf" in document:
        return end_to_end(document)
    if "rows" in document:
        return correctness(document)
    raise ValueError("expected the JSON of a script of this folder, got another")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        print(f"== {path.name}")
        try:
            print("\n".join(describe(json.loads(path.read_text()))), end="\n\n")
        except (OSError, ValueError, KeyError) as error:
            print(f"{type(error).__name__}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
