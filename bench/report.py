"""Committed JSON as the tables of bench/README.md and plots, and any JSON as a short text table.

    python bench/report.py FILE.json ...     text tables of these files
    python bench/report.py --write           the tables and bench/results/plots anew
    python bench/report.py --check           exit code 1 if the tables are not up to date

A table stands there between `<!-- table: NAME -->` and `<!-- end of table -->`. The tables named in
`TABLES` are made of `bench/results/cuda-*.json`, as `gpu.sh` writes them, and of `predictions.json`
there; where there is none, and where a row has no figure, they say "not measured".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from measuring.plots import write_plots
from measuring.text_tables import describe
from pairs.pairs import PAIRS, REAL

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
README = ROOT / "bench" / "README.md"
NOT_MEASURED = "not measured"
_MARKED = r"(<!-- table: {name} -->\n).*?(<!-- end of table -->)"

Document = dict[str, Any]


def load(folder: Path) -> list[Document]:
    """The JSON of a GPU in a folder, by name, and what was predicted of it."""
    paths = sorted(folder.glob("cuda-*.json"))
    for name in ("predictions", "captions"):
        paths += folder.glob(f"{name}.json")
    return [json.loads(path.read_text()) for path in paths]


def of_kind(documents: Iterable[Document], kind: str) -> list[Document]:
    return [document for document in documents if document.get("kind") == kind]


def pair_rows(documents: Iterable[Document]) -> list[Document]:
    """Rows of all end-to-end documents with their device; a measured one hides one that is not.

    A pair that no document has is there as a row that was not measured.
    """
    found: dict[tuple, Document] = {}
    for document in of_kind(documents, "e2e"):
        device = document["environment"]["device_name"]
        for row in document["pairs"]:
            key = (row["pair"], row["label"], row["batch"], row["context"], device)
            if key not in found or "not_measured" not in row:
                found[key] = {**row, "device": device}
    known = {key[0] for key in found}
    for name in REAL:
        if name not in known:
            row = {"pair": name, "label": PAIRS[name].label, "context": 16384, "batch": 1}
            found[name, row["label"], 1, 16384, ""] = {**row, "device": "", "not_measured": ""}
    names = list(PAIRS)
    return [found[key] for key in sorted(found, key=lambda key: (names.index(key[0]), *key[1:]))]


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A table; the first `left` columns are words, the others figures."""
    aligned = ["---"] * left + ["---:"] * (len(headings) - left)
    lines = [headings, aligned, *rows]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]


def _ms(methods: Document, name: str) -> str:
    found = methods.get(name, {"not_measured": ""})
    return NOT_MEASURED if "not_measured" in found else f"{found['wall_ms']:.2f}"


def _of_limit(methods: Document, name: str) -> str:
    found = methods.get(name, {})
    return f"{found['share_of_limit']:.0%}" if "share_of_limit" in found else NOT_MEASURED


def _times(row: Document, name: str) -> str:
    return f"{row[name]:.2f}x" if name in row else NOT_MEASURED


def _reason(row: Document) -> str:
    return f"{NOT_MEASURED}: {row['not_measured']}" if row["not_measured"] else NOT_MEASURED


def _names(row: Document) -> list[str]:
    return [row["label"], str(row["context"]), str(row["batch"]), row["device"] or "-"]


_ROW = ("target <- draft", "context", "batch", "device")


def _under(documents: Sequence[Document]) -> list[str]:
    """What the figures above were made with."""
    facts = []
    for document in documents:
        found = document["environment"]
        facts.append(
            f"{found['device_name']}, torch {found['torch']}, triton {found['triton']}, "
            f"transformers {found['transformers']}, commit {(found['commit'] or '-')[:12]}, copy "
            f"{document['limits']['copy_gb_per_s']:.0f} GB/s"
        )
    return ["", *(f"{fact}." for fact in dict.fromkeys(facts))] if facts else []


def e2e_table(documents: list[Document]) -> list[str]:
    """Iterations beside their limits, and the speed-up that follows."""
    rows = []
    for row in pair_rows(documents):
        if "not_measured" in row:
            rows.append([*_names(row), _reason(row), *[""] * 7])
            continue
        methods = row["methods"]
        rows.append(
            [
                *_names(row),
                _ms(methods, "lvspec"),
                _of_limit(methods, "lvspec"),
                _ms(methods, "lvspec eager"),
                _ms(methods, "autoregression"),
                _of_limit(methods, "autoregression"),
                row["replayed"],
                _times(row, "speedup"),
                methods["lvspec"].get("loop", NOT_MEASURED),
            ]
        )
    headings = (*_ROW, "ms an iteration", "of its byte limit", "not captured", "ms a token alone")
    headings += ("of its byte limit", "acceptance", "speed-up", "loop")
    return [*markdown(headings, rows), *_under(of_kind(documents, "e2e"))]


def peers_table(documents: list[Document]) -> list[str]:
    """The same work by others, with the same weights in the same run."""
    rows = []
    for row in pair_rows(documents):
        if row["batch"] != 1:
            continue
        if "not_measured" in row:
            rows.append([*_names(row), _reason(row), *[""] * 6])
            continue
        methods = row["methods"]
        rows.append(
            [
                *_names(row),
                _ms(methods, "hf generate"),
                _ms(methods, "hf static, compiled"),
                _ms(methods, "hf assisted"),
                _times(row, "over_hf_assisted"),
                _ms(methods, "specvlm step"),
                _ms(methods, "lvspec, specvlm tree"),
                _times(row, "over_specvlm_step"),
            ]
        )
    headings = (*_ROW, "hf generate, a token", "hf static and compiled, a token")
    headings += ("hf assisted, a round", "lvspec over it", "SpecVLM-style step")
    headings += ("lvspec with its tree", "lvspec over it")
    return markdown(headings, rows)


def embedded_table(documents: list[Document]) -> list[str]:
    headings = ("method", "tokens/s", "speed-up", "tau", "attributes", "captions")
    found = [d for d in of_kind(documents, "e2e") if "rows" in d.get("embedded", {})]
    if not found:
        return markdown(headings, [[NOT_MEASURED, *[""] * 5]])
    rows = [
        [
            row["method"],
            f"{row['tokens_per_s']:.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['tau']:.2f}",
            f"{row['attributes']:.1%}",
            f"{row['captions']:.1%}",
        ]
        for row in found[-1]["embedded"]["rows"]
    ]
    return [*markdown(headings, rows), *_under(found[-1:])]


def profile_table(documents: list[Document]) -> list[str]:
    headings = (*_ROW, "gaps within an iteration", "kernels", "expected", "most time")
    found = of_kind(documents, "profile")
    if not found:
        return markdown(headings, [[NOT_MEASURED, *[""] * 7]])
    rows = []
    for document in found:
        device, gaps = document["environment"]["device_name"], document["gaps"]
        within, count = gaps["share_within"], gaps["kernels_of_a_replay"]
        most = (f"{k['share']:.0%} `{k['name'][:40]}`" for k in document["kernels"][:3])
        rows.append(
            [
                *_names({**document, "device": device}),
                NOT_MEASURED if within is None else f"{within:.1%}",
                NOT_MEASURED if count is None else f"{count:.0f}",
                str(document.get("expected_kernels") or "-"),
                "; ".join(most) or NOT_MEASURED,
            ]
        )
    return markdown(headings, rows)


def predictions_table(documents: list[Document]) -> list[str]:
    """What is expected, beside what was measured at the same size."""
    headings = ("target <- draft", "context", "byte limit, ms", "kernels", "expected ms")
    headings += ("of its limit", "launched early, ms", "of its limit", "a token alone")
    headings += ("tau for 2x", "tau for 3x", "measured ms")
    found = of_kind(documents, "predictions")
    if not found:
        return markdown(headings, [[NOT_MEASURED, *[""] * 11]])
    measured = {
        (row["pair"], row["context"]): row["methods"]
        for row in pair_rows(documents)
        if row["batch"] == 1 and "not_measured" not in row
    }
    most = found[-1]["gamma"] + 1
    rows = []
    for row in found[-1]["rows"]:
        taus = (row["tau_for_2x"], row["tau_for_3x"])
        rows.append(
            [
                row["label"] + ("" if row["fits"] else " (does not fit)"),
                str(row["context"]),
                f"{row['limit_ms']:.1f}",
                str(row["kernels"]),
                f"{row['estimate_ms']:.1f}",
                f"{row['estimate_ms'] / row['limit_ms']:.2f}x",
                f"{row['early_ms']:.1f}",
                f"{row['early_ms'] / row['limit_ms']:.2f}x",
                f"{row['alone_ms']:.1f}",
                *(f"{tau:.1f}" if tau <= most else f"- ({tau:.1f})" for tau in taus),
                _ms(measured.get((row["pair"], row["context"]), {}), "lvspec"),
            ]
        )
    return markdown(headings, rows)


_HOURS = ("hours", "alone_hours")


def captions_table(documents: list[Document]) -> list[str]:
    """A million clips on paper."""
    headings = ("target <- draft", "GPUs", "that share a pass", "hours", "without a draft")
    headings += ("s a clip: CPUs", "vision", "prefill", "decoding", "batch", "limited by")
    headings += ("one clip", "its decoding")
    found = of_kind(documents, "captions")
    rows = []
    for row in found[-1]["rows"] if found else ():
        its = row["stages"]
        weights = " (fp8)" if row["weight_bytes"] == 1 else ""
        rows.append(
            [
                f"{row['target']}{weights} <- {row['draft']}",
                str(row["fleet"]),
                str(row["gpus"]),
                *(f"{row[name]:.{1 if row[name] < 100 else 0}f}" for name in _HOURS),
                *(f"{its[name]:.2f}" for name in ("cpu", "vision", "prefill", "decoding")),
                str(its["batch"]),
                row["limited_by"],
                *(f"{row[name]:.2f}x" for name in ("one_speedup", "one_decoding_speedup")),
            ]
        )
    return markdown(headings, rows or [[NOT_MEASURED, *[""] * 12]])


TABLES: dict[str, Callable[[list[Document]], list[str]]] = {
    "gpu-e2e": e2e_table,
    "gpu-peers": peers_table,
    "gpu-embedded": embedded_table,
    "gpu-profile": profile_table,
    "predictions": predictions_table,
    "captions": captions_table,
}


def with_tables(text: str, documents: list[Document]) -> str:
    """The text of bench/README.md with every table made anew.

    Raises:
        ValueError: It has no marks for one of them.
    """
    for name, make in TABLES.items():
        pattern = re.compile(_MARKED.format(name=re.escape(name)), flags=re.DOTALL)
        if not pattern.search(text):
            raise ValueError(
                f"bench/README.md: expected <!-- table: {name} --> and its end, got neither"
            )
        made = "\n".join(make(documents)) + "\n"
        text = pattern.sub(lambda found, made=made: f"{found[1]}{made}{found[2]}", text)
    return text


def print_text(paths: Iterable[Path]) -> None:
    for path in paths:
        print(f"== {path.name}")
        try:
            print("\n".join(describe(json.loads(path.read_text()))), end="\n\n")
        except (OSError, ValueError, KeyError) as error:
            print(f"{type(error).__name__}: {error}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true", help="the tables, and plots")
    parser.add_argument("--check", action="store_true", help="that the tables are up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--readme", type=Path, default=README)
    arguments = parser.parse_args()
    if not (arguments.files or arguments.write or arguments.check):
        parser.error("expected files, --write or --check")
    print_text(arguments.files)
    if not (arguments.write or arguments.check):
        return 0
    documents = load(arguments.results)
    before = arguments.readme.read_text(encoding="utf-8")
    after = with_tables(before, documents)
    if arguments.check:
        if after != before:
            print(
                "bench/README.md: tables are not up to date; bench/report.py --write",
                file=sys.stderr,
            )
        return int(after != before)
    arguments.readme.write_text(after, encoding="utf-8")
    try:
        for path in write_plots(pair_rows(documents), arguments.results / "plots"):
            print(path.name)
    except ImportError as reason:
        print(reason, file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
