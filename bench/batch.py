"""Many clips at once: `generate_many` against one clip after the other, on the embedded pair.

    python bench/batch.py [--clips 32] [--batches 1 2 4 8] [--threads 1] [--json FILE]

Tokens per second over all clips, prefill included, reading of files not; medians of three rounds in
which all sizes take turns. Captions of every size must be right as often as those of size 1; in
float32 near ties may fall otherwise in products of other sizes, and how many captions did is shown.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from lvspec import AcceptancePolicy, DecodeConfig, generate_many
from lvspec.environment import check_json_path, environment, write_json
from lvspec.shapes.captions import judge
from lvspec.shapes.evaluation import MAX_NEW_TOKENS, make_clips
from lvspec.shapes.pair import load_embedded_pair

POLICIES = {
    "autoregression": None,
    "strict": AcceptancePolicy.strict(),
    "lvspec": AcceptancePolicy.lvspec(),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.json:
        check_json_path(arguments.json)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    pair = load_embedded_pair()
    tokenizer = pair.processor.tokenizer
    config = DecodeConfig(max_new_tokens=MAX_NEW_TOKENS)
    cases = [(name, size) for name in POLICIES for size in arguments.batches]
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    texts: dict[tuple[str, int], list[str]] = {}
    parts: dict[tuple[str, int], dict[str, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(pair, "evaluation", arguments.clips, Path(folder))
    for turn in range(4):  # the first to warm up
        for name, size in cases:
            policy = POLICIES[name]
            draft = None if policy is None else pair.draft
            start = time.perf_counter()
            found = list(
                generate_many(
                    pair.target,
                    draft,
                    (clip.inputs for clip in clips),
                    batch_size=size,
                    policy=policy,
                    config=config,
                    tokenizer=tokenizer,
                )
            )
            seconds = time.perf_counter() - start
            if turn:
                rates[name, size].append(sum(x.tokens.shape[1] for x in found) / seconds)
            parts[name, size] = found[-1].stats.parts
            texts[name, size] = [generation.text for generation in found]
    rows = []
    table = Table("method", "batch", "tokens/s", "times batch 1", "captions right", "other words")
    for name, size in cases:
        first = texts[name, arguments.batches[0]]
        right = [
            judge(text, clip.scene)[2] for clip, text in zip(clips, texts[name, size], strict=True)
        ]
        row = {
            "method": name,
            "batch": size,
            "tokens_per_second": median(rates[name, size]),
            "speedup": median(rates[name, size]) / median(rates[name, arguments.batches[0]]),
            "captions": sum(right) / len(right),
            "other_words": sum(a != b for a, b in zip(first, texts[name, size], strict=True)),
            "parts": parts[name, size],
        }
        rows.append(row)
        table.add_row(
            name,
            str(size),
            f"{row['tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['captions']:.1%}",
            str(row["other_words"]),
        )
    Console().print(table)
    if arguments.json:
        write_json(
            arguments.json,
            {"rows": rows, "clips": len(clips), "environment": environment()},
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
