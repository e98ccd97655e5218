"""What each part of the policy is worth, on held-out clips of a trained pair.

    python bench/ablation.py [--pair embedded] [--clips 200] [--gamma 12] [--json FILE]

The gates: none; random, with as many anchors as the shipped one; attention mass; attention peak;
peak with shifts (the shipped policy); an oracle that knows the anchor words. The threshold of the
mass gate is the quantile of the mass, on calibration scenes, that the shipped threshold is of the
peak.
"""

from __future__ import annotations

import math
from dataclasses import replace

from measuring import script
from pairs import trained

from lvspec.config import DecodeConfig
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.calibration import collect_scores
from lvspec.shapes.evaluation import MAX_NEW_TOKENS, lvspec_method, random_gate, run_methods


def main() -> int:
    parser = trained.parser_of(__doc__, clips=200)
    trained.add_pair(parser)
    parser.add_argument("--calibration-clips", type=int, default=48)
    parser.add_argument("--gamma", type=int, default=12)
    arguments, setup = trained.begin(parser)
    config = DecodeConfig(gamma=arguments.gamma, max_new_tokens=MAX_NEW_TOKENS)
    pair, task = setup.pair, setup.task
    shipped, anchors = task.anchor_threshold, task.token_anchors
    calibration = setup.clips("calibration", arguments.calibration_clips)
    peaks, _ = collect_scores(pair, calibration, config, "attention_peak", anchors)
    masses, _ = collect_scores(pair, calibration, config, "attention_mass", anchors)
    share = float((peaks >= shipped).float().mean())
    mass_threshold = float(masses.quantile(1 - share))

    def gate(scorer: object, threshold: float, **overrides: object) -> object:
        policy = AcceptancePolicy.lvspec(anchor_threshold=threshold, **overrides)
        return lvspec_method(pair, policy, replace(config, scorer=scorer))

    peak = "attention_peak"
    methods = {
        "autoregression": lvspec_method(pair, None, config),
        "strict": lvspec_method(pair, AcceptancePolicy.strict(), config),
        "no gate": gate(peak, math.inf, shift_window=0),
        "random gate": gate(random_gate(share), 0.5, shift_window=0),
        "mass": gate("attention_mass", mass_threshold, shift_window=0),
        "peak": gate(peak, shipped, shift_window=0),
        "peak + shift": gate(peak, shipped),
        "oracle gate": gate(task.oracle_gate(pair), 0.5, shift_window=0),
    }
    clips = setup.clips("evaluation", arguments.clips)
    results = run_methods(methods, clips)
    rows = [result.summary(clips, results["autoregression"]) for result in results.values()]
    script.print_table(
        ("gate", "tau", "speed-up", "attributes", "captions", "of target", "regret"),
        [
            (
                row["method"],
                f"{row['tau']:.2f}",
                f"{row['speedup']:.2f}x",
                f"{row['attributes']:.2%}",
                f"{row['captions']:.1%}",
                script.of_target(row),
                f"{row['regret']:.2f}",
            )
            for row in rows
        ],
        title=f"{len(clips)} held-out clips, gamma {config.gamma}, anchors {share:.1%}",
    )
    facts = {"anchor_share": share, "mass_threshold": mass_threshold, "pair": setup.name}
    figures = {"rows": rows, **facts, "clips": len(clips), "gamma": config.gamma}
    script.finish(arguments, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
