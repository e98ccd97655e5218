"""What a repetition penalty in the target's generation config costs on a trained pair.

    python bench/penalty.py [--pair embedded] [--clips 24] [--penalty 1.05] [--json FILE]

Tau, tokens/s and fidelity of strict and loose decoding with the penalty and without, all in one
run, relative to the target's own captions under the same penalty.
"""

from __future__ import annotations

from measuring import script
from pairs import trained

from lvspec.config import DecodeConfig
from lvspec.evaluation.methods import lvspec_method
from lvspec.shapes.evaluation import MAX_NEW_TOKENS, run_methods


def main() -> None:
    parser = trained.parser_of(__doc__, clips=24)
    trained.add_pair(parser)
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--penalty", type=float, default=1.05)
    arguments, setup = trained.begin(parser)
    pair = setup.pair
    pair.target.generation_config.repetition_penalty = arguments.penalty
    clips = setup.clips("evaluation", arguments.clips)
    methods = {}
    for is_applied in (False, True):
        config = DecodeConfig(
            gamma=arguments.gamma, max_new_tokens=MAX_NEW_TOKENS, generation_config=is_applied
        )
        for name, policy in setup.policies().items():
            methods[name, is_applied] = lvspec_method(pair, policy, config)
    results = run_methods(methods, clips)
    rows = []
    for (name, is_applied), result in results.items():
        row = result.summary(clips, results["autoregression", is_applied])
        penalty = arguments.penalty if is_applied else None
        rows.append({**row, "method": name, "repetition_penalty": penalty})
    script.print_table(
        ("method", "penalty", "tau", "tokens/s", "attributes", "captions", "regret"),
        [
            (
                row["method"],
                "-" if row["repetition_penalty"] is None else f"{row['repetition_penalty']:g}",
                f"{row['tau']:.2f}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['attributes']:.1%}",
                f"{row['captions']:.1%}",
                f"{row['regret']:.2f}",
            )
            for row in rows
        ],
        title=f"{len(clips)} held-out clips, gamma {arguments.gamma}",
    )
    script.finish(arguments, {"rows": rows, "pair": setup.name})


if __name__ == "__main__":
    main()
