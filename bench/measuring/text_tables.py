"""The short text table of what a script of this folder measured.

Microseconds: `limit` is bytes over the copy bandwidth of the same run, `ours` a replayed CUDA graph
(on the CPU a call), `calls` the same from Python, `share` limit over ours. Milliseconds where whole
iterations are meant.
"""

from __future__ import annotations

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
    missing = document.get("num_checks", len(rows)) - len(rows)
    if missing:
        lines.append(f"interrupted: {missing} checks were not reached")
    return lines


def end_to_end(document: dict[str, Any]) -> list[str]:
    versions, limits = document["environment"], document["limits"]
    lines = [
        f"{versions['device_name']}, torch {versions['torch']}, commit "
        f"{(versions['commit'] or '-')[:12]}: copy {limits['copy_gb_per_s']:.0f} GB/s, read "
        f"{limits['read_gb_per_s']:.0f} GB/s"
    ]
    embedded = document.get("embedded", {})
    if "not_measured" in embedded:
        lines += ["", f"embedded pair: not measured: {embedded['not_measured']}"]
    elif embedded:
        lines += ["", f"{'embedded pair':16} tokens/s speedup   tau captions"]
        for row in embedded["rows"]:
            lines.append(
                f"{row['method']:16} {row['tokens_per_s']:8.0f} {row['speedup']:6.2f}x "
                f"{row['tau']:5.2f} {row['captions']:8.1%}"
            )
        equal, clips = embedded["strict_equals_hf"], embedded["clips"]
        lines.append(f"strict equals hf generate on {equal} of {clips} clips")
    for row in document["pairs"]:
        name = f"{row['label']}, context {row['context']}, batch {row['batch']}"
        if "not_measured" in row:
            lines += ["", f"{name}: not measured: {row['not_measured']}"]
            continue
        lines += ["", f"{name}, gamma {row['gamma']}, {row['replayed']}"]
        for method, found in row["methods"].items():
            lines.append(f"  {method:22} {_method(found)}")
        lines += [f"  {what}: {said}" for what, said in row["checks"].items()]
        if "speedup" in row:
            lines.append(f"  speed-up {row['speedup']:.2f}x")
    return lines


def _method(found: dict[str, Any]) -> str:
    if "not_measured" in found:
        return f"not measured: {found['not_measured']}"
    spread = f"{found['p20_ms']:.2f}-{found['p80_ms']:.2f}"
    words = [f"{found['wall_ms']:9.3f} ms ({spread})"]
    if "limit_ms" in found:
        words.append(f"limit {found['limit_ms']:.3f} ({found['share_of_limit']:.0%})")
    return ", ".join([*words, *([found["loop"]] if "loop" in found else [])])


def profile(document: dict[str, Any]) -> list[str]:
    gaps, within = document["gaps"], document["gaps"]["share_within"]
    lines = [
        f"{document['label']}, context {document['context']}, batch {document['batch']}, "
        f"{document['loop']}",
        f"{'step':28} {'calls':>10} {'graph':>10}",
    ]
    for name, found in document["steps"].items():
        lines.append(f"{name:28} {_us(found['calls_ms']):>10} {_us(found['graph_ms']):>10}")
    said = "not measured" if within is None else f"{within:.1%}"
    lines.append(f"gaps within a replayed iteration: {said}; {gaps['replays']} replays")
    for kernel in document["kernels"][:10]:
        lines.append(f"{kernel['share']:6.1%} {kernel['count']:7} {kernel['name'][:70]}")
    return lines


def predictions(document: dict[str, Any]) -> list[str]:
    lines = [
        f"{document['gpu']}, {document['gb_per_s']:.0f} GB/s, gamma {document['gamma']}, "
        f"{document['kernel_us']:.1f} us a kernel, {document['early_us']:.1f} launched early: "
        "nothing of this is measured",
        f"{'target <- draft':58} context   limit kernels estimate   early   alone    2x    3x",
    ]
    for row in document["rows"]:
        lines.append(
            f"{row['label']:58} {row['context']:7} {row['limit_ms']:7.1f} {row['kernels']:7} "
            f"{row['estimate_ms']:8.1f} {row['early_ms']:7.1f} {row['alone_ms']:7.1f} "
            f"{row['tau_for_2x']:5.1f} {row['tau_for_3x']:5.1f}"
            f"{'' if row['fits'] else '  does not fit'}"
        )
    return lines


def captions(document: dict[str, Any]) -> list[str]:
    clip = document["clip"]
    lines = [
        f"a million clips, {document['gpu']}: {clip['prompt']} tokens, {clip['new_tokens']} new, "
        f"{clip['workers']} cores a GPU: nothing of this is measured; seconds a clip and group",
        f"{'target <- draft':34} GPUs group   hours   alone    cpu vision prefill decoding batch  "
        "limited by      one clip, decoding",
    ]
    for row in document["rows"]:
        its = row["stages"]
        weights = " (fp8)" if row["weight_bytes"] == 1 else ""
        lines.append(
            f"{row['target'] + weights + ' <- ' + row['draft']:34} {row['fleet']:4} "
            f"{row['gpus']:5} {row['hours']:7.1f} {row['alone_hours']:7.1f} {its['cpu']:6.2f} "
            f"{its['vision']:6.2f} {its['prefill']:7.2f} {its['decoding']:8.2f} {its['batch']:5}  "
            f"{row['limited_by']:14} {row['one_speedup']:8.2f}x "
            f"{row['one_decoding_speedup']:8.2f}x"
        )
    return lines


def facts(document: dict[str, Any]) -> list[str]:
    return [f"{name:20} {value}" for name, value in document["limits"].items()]


def _us(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "-"
    value = 1e3 * milliseconds
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def describe(document: dict[str, Any]) -> list[str]:
    """The lines for one document, whichever script wrote it.

    Raises:
        ValueError: None of them did.
    """
    if "benchmarks" in document:
        return microbenchmarks(document)
    kinds = {"e2e": end_to_end, "profile": profile, "predictions": predictions}
    kinds |= {"facts": facts, "captions": captions}
    if document.get("kind") in kinds:
        return kinds[document["kind"]](document)
    if "rows" in document:
        return correctness(document)
    raise ValueError("expected the JSON of a script of this folder, got another")
