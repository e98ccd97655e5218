"""Many clips at once: `generate_many` against one clip after the other.

    python bench/batch.py [--pair embedded] [--clips 32] [--batches 1 2 4 8] [--threads 1]
        [--json FILE]

Tokens per second over all clips, prefill included, reading of files not; medians of three rounds in
which all sizes take turns. Captions of every size must be right as often as those of size 1; in
float32 near ties may fall otherwise in products of other sizes, and how many captions did is shown.
"""

from __future__ import annotations

import time
from statistics import median

from measuring import script
from pairs import trained

from lvspec import DecodeConfig, generate_many
from lvspec.shapes.evaluation import MAX_NEW_TOKENS


def main() -> int:
    parser = trained.parser_of(__doc__, clips=32)
    trained.add_pair(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments, setup = trained.begin(parser)
    pair, policies = setup.pair, setup.policies()
    tokenizer = pair.processor.tokenizer
    config = DecodeConfig(gamma=12, max_new_tokens=MAX_NEW_TOKENS)
    cases = [(name, size) for name in policies for size in arguments.batches]
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    texts: dict[tuple[str, int], list[str]] = {}
    parts: dict[tuple[str, int], dict[str, dict[str, int]]] = {}
    clips = setup.clips("evaluation", arguments.clips)
    for turn in range(4):  # the first to warm up
        for name, size in cases:
            policy = policies[name]
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
    for name, size in cases:
        first = texts[name, arguments.batches[0]]
        right = [
            clip.judge(text, clip.scene)[2]
            for clip, text in zip(clips, texts[name, size], strict=True)
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
    script.print_table(
        ("method", "batch", "tokens/s", "times batch 1", "captions right", "other words"),
        [
            (
                row["method"],
                str(row["batch"]),
                f"{row['tokens_per_second']:.0f}",
                f"{row['speedup']:.2f}x",
                f"{row['captions']:.1%}",
                str(row["other_words"]),
            )
            for row in rows
        ],
    )
    script.finish(arguments, {"rows": rows, "pair": setup.name, "clips": len(clips)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
