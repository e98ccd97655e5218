"""What each part of the policy is worth, on held-out clips of a trained pair.

    python bench/ablation.py [--pair embedded] [--clips 200] [--gamma 12] [--json FILE]

The gates: none; none, but a limit on the regret of a token; random, with as many anchors as the
shipped one; attention mass; attention peak; peak with shifts (the shipped policy); an oracle that
knows the anchor words. The threshold of the mass gate is the quantile of the mass, on calibration
scenes, that the shipped threshold is of the peak. `as target` is the share of what the target
states that a method states alike; an anchor is unsure if the target's second choice is within one
nat of its first.
"""

from __future__ import annotations

import math
from dataclasses import replace

from measuring import script
from pairs import trained

from lvspec.config import DecodeConfig
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.calibration import area_under_curve, collect_scores, lead
from lvspec.shapes.evaluation import (
    MAX_NEW_TOKENS,
    agreement,
    lvspec_method,
    random_gate,
    run_methods,
)

REGRETS = (0.5, 1.0, 2.0)  # nats


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
    peaks, flags = collect_scores(pair, calibration, config, "attention_peak", anchors)
    masses, _ = collect_scores(pair, calibration, config, "attention_mass", anchors)
    share = float((peaks >= shipped).float().mean())
    curves = {
        "attention_peak": area_under_curve(peaks, flags),
        "attention_mass": area_under_curve(masses, flags),
    }
    mass_threshold = float(masses.quantile(1 - share))

    def gate(scorer: object, threshold: float, **overrides: object) -> object:
        policy = AcceptancePolicy.lvspec(anchor_threshold=threshold, **overrides)
        return lvspec_method(pair, policy, replace(config, scorer=scorer))

    peak = "attention_peak"
    methods = {
        "autoregression": lvspec_method(pair, None, config),
        "strict": lvspec_method(pair, AcceptancePolicy.strict(), config),
        "no gate": gate(peak, math.inf, shift_window=0),
        **{
            f"regret {limit}": gate(peak, math.inf, shift_window=0, max_regret=limit)
            for limit in REGRETS
        },
        "random gate": gate(random_gate(share), 0.5, shift_window=0),
        "mass": gate("attention_mass", mass_threshold, shift_window=0),
        "peak": gate(peak, shipped, shift_window=0),
        "peak + shift": gate(peak, shipped),
        "oracle gate": gate(task.oracle_gate(pair), 0.5, shift_window=0),
    }
    clips = setup.clips("evaluation", arguments.clips)
    leads, flags = collect_scores(pair, clips, config, lead, anchors)
    unsure = float((leads[flags] < 1).float().mean())
    results = run_methods(methods, clips)
    baseline = results["autoregression"]
    rows = [
        {**result.summary(clips, baseline), "agreement": agreement(result, baseline, task.read)}
        for result in results.values()
    ]
    headings = ("gate", "tau", "speed-up", "attributes", "captions", "of target", "as target")
    script.print_table(
        (*headings, "regret"),
        [
            (
                row["method"],
                f"{row['tau']:.2f}",
                f"{row['speedup']:.2f}x",
                f"{row['attributes']:.2%}",
                f"{row['captions']:.1%}",
                script.of_target(row),
                f"{row['agreement']:.2%}",
                f"{row['regret']:.2f}",
            )
            for row in rows
        ],
        title=f"{len(clips)} held-out clips, gamma {config.gamma}, anchors {share:.1%}",
    )
    facts = {"anchor_share": share, "auc": curves, "unsure_anchors": unsure}
    facts |= {"anchor_threshold": shipped, "mass_threshold": mass_threshold, "pair": setup.name}
    print(facts)
    figures = {"rows": rows, **facts, "clips": len(clips), "gamma": config.gamma}
    script.finish(arguments, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
