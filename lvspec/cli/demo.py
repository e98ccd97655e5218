"""lvspec demo: real video files, captioned by every method in one run, beside each other."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from lvspec.cli.options import gamma_of
from lvspec.cli.terminal import caption_text, legend
from lvspec.config import DecodeConfig
from lvspec.environment import check_json_path, environment, write_json
from lvspec.evaluation.methods import EvaluationInterrupted, huggingface_method, lvspec_method
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.evaluation import MAX_NEW_TOKENS, Clip, MethodResult, run_methods
from lvspec.shapes.tasks import Task, choose
from lvspec.tree import MAX_SLOTS

REFERENCE = "autoregression"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command `demo`."""
    parser = subparsers.add_parser(
        "demo", help="caption held-out clips with a trained pair, by every method in one run"
    )
    add = parser.add_argument
    add("--clips", type=int, default=24, metavar="N", help="held-out clips (default 24)")
    add(
        "--gamma",
        type=gamma_of,
        default="auto",
        metavar="N",
        help=f"draft tokens per pass, 1 to {MAX_SLOTS - 1}, or auto: what is found best (default)",
    )
    add("--threads", type=int, default=1, metavar="N", help="torch threads (default 1)")
    add(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="FOLDER",
        help="where the MP4s go (default demo-out)",
    )
    add(
        "--pair",
        default="embedded",
        help="embedded (default), or real: a pretrained language model, set up by make real",
    )
    add("--json", type=Path, metavar="FILE", help="write rows and environment to this file")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Raises:
        ImportError: `--pair real` needs what is not installed; says how to install it.
        OSError: `--out` or `--json` cannot be written; the latter is found out before, if it can.
        ValueError: There is no such `--pair`, `--clips` or `--threads` is below 1, or gamma out of
            range.
    """
    task = choose(arguments.pair)
    for name in ("clips", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    try:
        config = DecodeConfig(gamma=arguments.gamma, max_new_tokens=MAX_NEW_TOKENS)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    if arguments.json and arguments.json.parent.resolve() != arguments.out.resolve():
        check_json_path(arguments.json)  # nothing is made where it is wrong
    _make_folder(arguments.out)
    if arguments.json:
        check_json_path(arguments.json)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    console = Console()
    pair = task.load()
    clips = task.make_clips(pair, "evaluation", arguments.clips, arguments.out)
    loose = AcceptancePolicy.lvspec()
    methods = {
        REFERENCE: lvspec_method(pair, None, config),
        "hf generate": huggingface_method(pair, max_new_tokens=MAX_NEW_TOKENS, assisted=False),
        "hf assisted": huggingface_method(pair, max_new_tokens=MAX_NEW_TOKENS, assisted=True),
        "strict": lvspec_method(pair, AcceptancePolicy.strict(), config),
        "fly": lvspec_method(pair, AcceptancePolicy.fly(), config),
        "lvspec": lvspec_method(pair, loose, config),
    }
    interrupted = False
    try:
        results = run_methods(methods, clips)
    except EvaluationInterrupted as stopped:
        interrupted, results = True, stopped.results
        clips = clips[: len(results[REFERENCE].outputs)]
        console.print(f"interrupted; {len(clips)} clips are complete, all are in {arguments.out}")
        if not clips:
            return 130
    rows = [result.summary(clips, results[REFERENCE]) for result in results.values()]
    console.print(_table(rows, len(clips), config.gamma, arguments.pair))
    if config.gamma == "auto":
        chosen = ", ".join(f"{row['method']} {_then(row['gamma'])}" for row in rows if row["gamma"])
        console.print(f"gamma, as found best with what was accepted so far: {chosen}")
    console.print(_warm_up(rows))
    equal = _equal_captions(results["strict"], results["hf generate"])
    console.print(f"strict says what hf generate says on {equal} of {len(clips)} clips")
    _show_one(console, task, clips, results)
    if arguments.json:
        facts = {"pair": arguments.pair, "clips": len(clips), "gamma": config.gamma}
        facts["strict_equals_hf"] = equal
        write_json(arguments.json, {"rows": rows, **facts, "environment": environment()})
        console.print(f"rows written to {arguments.json}")
    return 130 if interrupted else 0


def _make_folder(path: Path) -> None:
    """The folder of `--out`, made if need be, and one that can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = "a file" if path.is_file() else error.strerror
        raise OSError(f"--out: expected a folder, got {path}: {got}") from error
    if not os.access(path, os.W_OK):
        raise PermissionError(f"--out: expected a folder that can be written, got {path}")


def _then(gammas: list[int]) -> str:
    return " then ".join(map(str, gammas))


def _table(rows: list[dict], clips: int, gamma: int | str, pair: str) -> Table:
    # Narrow enough for eighty columns.
    table = Table(
        title=f"{clips} held-out clips, gamma {gamma}, {pair} pair",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    table.add_column("method", no_wrap=True)
    headings = ("tokens/s", "speedup", "decode", "tau", "attributes", "captions", "regret")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['tokens_per_s']:.0f}",
            f"{row['speedup']:.2f}x",
            "-" if row["decode_speedup"] is None else f"{row['decode_speedup']:.2f}x",
            f"{row['tau']:.2f}",
            *(_share(row, name) for name in ("attributes", "captions")),
            f"{row['regret']:.2f}",
            style="bold" if row["method"] == "lvspec" else None,
        )
    table.caption = (
        "tokens/s, speedup: medians over clips, prefill included; decode: speed-up without it; "
        "tau: tokens per target pass; attributes, captions: per cent that are right / relative to "
        "the target's own; regret: nats per caption"
    )
    return table


def _warm_up(rows: list[dict]) -> str:
    seconds = ", ".join(f"{row['method']} {row['warm_up_s']:.1f} s" for row in rows)
    return f"warm-up, a caption beforehand that does not count: {seconds}"


def _equal_captions(first: MethodResult, second: MethodResult) -> int:
    pairs = zip(first.outputs, second.outputs, strict=True)
    return sum(mine.text == theirs.text and mine.tokens == theirs.tokens for mine, theirs in pairs)


def _share(row: dict, name: str) -> str:
    relative = row["fidelity"][name]
    return f"{100 * row[name]:.1f}/{'-' if relative is None else f'{100 * relative:.1f}'}"


def _show_one(
    console: Console, task: Task, clips: list[Clip], results: dict[str, MethodResult]
) -> None:
    """The caption with the most mismatches, every token in the colour of its kind."""
    outputs = results["lvspec"].outputs

    def mismatches(index: int) -> int:
        counts = outputs[index].generation.stats.counts
        return counts["loose"] + 3 * counts["shift"]

    chosen = max(range(len(clips)), key=mismatches)
    generation = outputs[chosen].generation
    console.print()
    console.print(caption_text(generation, anchors=task.token_anchors(generation)))
    console.print(legend())
    console.print(f"the clip: {clips[chosen].path}")
