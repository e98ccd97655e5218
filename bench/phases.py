"""Where the time of a caption goes, by phase, on one CPU thread.

    python bench/phases.py [--clips 8] [--fuse none] [--threads 1] [--gamma 12] [--json FILE]

Milliseconds per iteration of lvspec and per token of autoregression with the embedded pair, medians
over clips. `--fuse none` runs HF's forward instead of lvspec's pass, and LVSPEC_BACKEND=reference
computes the operations with PyTorch.
"""

from __future__ import annotations

import statistics

from measuring import script
from pairs import trained

import lvspec
from lvspec import ops
from lvspec.config import FUSE

PHASES = ("prefill", "draft", "verify", "accept", "commit")


def main() -> None:
    parser = trained.parser_of(__doc__, clips=8)
    parser.add_argument("--fuse", choices=FUSE, default="kernels")
    parser.add_argument("--gamma", type=int, default=12)
    options, setup = trained.begin(parser)
    pair = setup.pair
    inputs = [clip.inputs for clip in setup.clips("evaluation", options.clips)]
    config = lvspec.DecodeConfig(gamma=options.gamma, max_new_tokens=160, fuse=options.fuse)
    results = {"backend": ops.active_backend("cpu"), "fuse": options.fuse}
    print(results)
    rates = {}
    for name, draft in (("autoregression", None), ("lvspec", pair.draft)):
        rows = []
        warm_up = inputs[:2]
        for clip in [*warm_up, *inputs]:
            result = lvspec.generate(pair.target, draft, clip, config=config)
            count = result.stats.num_iterations
            seconds = result.stats.seconds
            row = {phase: 1e3 * seconds[phase] / count for phase in PHASES[1:]}
            row["prefill"] = 1e3 * seconds["prefill"]  # once a caption
            row["caption"] = 1e3 * sum(seconds.values())
            row["tokens"] = result.tokens.shape[1]
            rows.append(row)
        rows = rows[len(warm_up) :]
        median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        rates[name] = statistics.median(1e3 * row["tokens"] / row["caption"] for row in rows)
        iteration = sum(median[phase] for phase in PHASES[1:])
        print(f"{name}: {rates[name]:.0f} tokens/s, prefill {median['prefill']:.1f} ms, iteration")
        for phase in PHASES[1:]:
            share = median[phase] / iteration
            print(f"  {phase:<8} {median[phase]:6.2f} ms  {share:4.0%}")
        print(f"  {'all':<8} {iteration:6.2f} ms")
        results[name] = {**median, "tokens_per_second": rates[name], "parts": result.stats.parts}
    print(f"speed-up {rates['lvspec'] / rates['autoregression']:.2f}x")
    script.finish(options, results)


if __name__ == "__main__":
    main()
