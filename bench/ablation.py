"""What each part of the policy is worth, on held-out clips of a trained pair.

    python bench/ablation.py [--pair embedded] [--clips 200] [--gamma 12] [--gates shipped]
                             [--only NAMES] [--lines FILE] [--json FILE]

The gates: none; none, but a limit on the regret of a token; chance, which passes any mismatch at a
share of the rows; then `lvspec()` with a threshold set by hand on other clips, with one found in
each sequence (the default), without its `anchor_regret`, and found in the attention's mass or in
the later half of the layers alone; an oracle that knows the anchor words. `as target` is the share
of what the target states that a method states alike; an anchor is unsure if the target's second
choice is within one nat of its first. `strict` counts iterations in which no threshold was found.

With `--gates others` candidates that do not ship stand beside the most important of these
(`pairs/gates.py`), each in the rule of `lvspec()`, in the same loop: the peak against a running
mean or quantile of the sequence's own, layers by depth, heads that were chosen on other clips by
their labels and without, the attention sink taken out, and the draft's peak, doubt and entropy.

With `--lines` every caption is written down as it is made, and the same command goes on there.
Ctrl-C ends a run with the figures of the clips that are complete.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from measuring import script
from pairs import gates, trained
from pairs.kept import KeptOutputs

from lvspec.config import DecodeConfig
from lvspec.evaluation.methods import (
    EvaluationInterrupted,
    Method,
    lvspec_method,
)
from lvspec.phases.relevance import attention_peak
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.calibration import area_under_curve, collect_scores, lead
from lvspec.shapes.evaluation import MAX_NEW_TOKENS, Clip, agreement, run_methods

BASELINE = "autoregression"
REGRETS = (0.25, 0.5, 1.0, 2.0)  # nats
SHARES = (0.5, 0.75)  # of the rows, at which chance passes
NOT_BESIDE_OTHERS = ("regret 0.5", "regret 2.0", "chance 0.5", "found, exact", "oracle, exact")


def others(
    setup: trained.Trained, calibration: list[Clip], config: DecodeConfig
) -> tuple[dict[str, Method], dict[str, float]]:
    """The candidates, and areas under the curve on the calibration clips, those that ship too."""
    pair, anchors = setup.pair, setup.task.token_anchors
    peaks, flags = gates.collect(pair, calibration, config, {"": gates.every_head}, anchors)
    candidates = gates.candidates(peaks[""], flags)
    scores = gates.SHIPPED | {name: score for name, (score, _) in candidates.items()}
    found, flags = gates.collect(pair, calibration, config, scores, anchors)
    curves = {name: area_under_curve(score, flags) for name, score in found.items()}
    lvspec = AcceptancePolicy.lvspec
    decoder = gates.GateDecoder(pair, lvspec(), config, gates.SHIPPED["peak"])
    methods = {
        name: decoder.method(score, lvspec(anchor_threshold=threshold))
        for name, (score, threshold) in candidates.items()
    }
    return methods, curves


def main() -> int:
    parser = trained.parser_of(__doc__, clips=200)
    trained.add_pair(parser)
    parser.add_argument("--calibration-clips", type=int, default=48)
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--gates", choices=("shipped", "others"), default="shipped")
    parser.add_argument("--only", metavar="NAMES", help="these rows, with commas between them")
    parser.add_argument("--lines", type=Path, metavar="FILE", help="one line of JSON a caption")
    arguments, setup = trained.begin(parser)
    config = DecodeConfig(gamma=arguments.gamma, max_new_tokens=MAX_NEW_TOKENS)
    pair, task = setup.pair, setup.task
    anchors = task.token_anchors
    calibration = setup.clips("calibration", arguments.calibration_clips)
    depth = pair.target.config.get_text_config().num_hidden_layers
    later = partial(attention_peak, layers=range(depth // 2, depth))

    def method(policy: AcceptancePolicy | None, **changes: object) -> object:
        return lvspec_method(pair, policy, replace(config, **changes))

    def free(**fields: object) -> object:
        return method(AcceptancePolicy(anchor_threshold=math.inf, top_k=5, **fields))

    lvspec, oracle = AcceptancePolicy.lvspec, task.oracle_gate(pair)
    methods = {
        BASELINE: method(None),
        "strict": method(AcceptancePolicy.strict()),
        "no gate": free(),
        **{f"regret {limit}": free(max_regret=limit) for limit in REGRETS},
        **{f"chance {s}": method(AcceptancePolicy.random_relaxation(s)) for s in SHARES},
        "by hand": method(lvspec(anchor_threshold=task.anchor_threshold)),
        "found": method(lvspec()),
        "found, exact": method(lvspec(anchor_regret=None)),
        "found, mass": method(lvspec(), scorer="attention_mass"),
        "found, later half": method(lvspec(), scorer=later),
        "oracle": method(lvspec(anchor_threshold=0.5), scorer=oracle),
        "oracle, exact": method(lvspec(anchor_threshold=0.5, anchor_regret=None), scorer=oracle),
    }
    if arguments.gates == "others":
        added, curves = others(setup, calibration, config)
        methods = {name: m for name, m in methods.items() if name not in NOT_BESIDE_OTHERS} | added
    else:
        scorers = {"peak": "attention_peak", "mass": "attention_mass", "later half": later}
        curves = {
            name: area_under_curve(*collect_scores(pair, calibration, config, scorer, anchors))
            for name, scorer in scorers.items()
        }
    if arguments.only:
        chosen = [BASELINE, *arguments.only.split(",")]
        methods = {name: method for name, method in methods.items() if name in chosen}
    settings = {"pair": setup.name, "gamma": config.gamma, "calibration": len(calibration)}
    kept = KeptOutputs(arguments.lines, settings)
    methods = {name: kept.method(name, method) for name, method in methods.items()}
    clips = setup.clips("evaluation", arguments.clips)
    try:
        results = run_methods(methods, clips)
    except EvaluationInterrupted as interrupted:
        results = interrupted.results
        clips = clips[: len(results[BASELINE].outputs)]
        if not clips:
            raise
    leads, flags = collect_scores(pair, clips, config, lead, anchors)
    unsure = float((leads[flags] < 1).float().mean())
    baseline = results[BASELINE]
    rows = [
        {
            **result.summary(clips, baseline),
            "agreement": agreement(result, baseline, task.read),
            "strict_iterations": sum(out.strict for out in result.outputs),
            "iterations": sum(out.passes for out in result.outputs),
        }
        for result in results.values()
    ]
    headings = ("gate", "tau", "speed-up", "attributes", "captions", "of target", "as target")
    script.print_table(
        (*headings, "regret", "strict"),
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
                f"{row['strict_iterations']} of {row['iterations']}",
            )
            for row in rows
        ],
        title=f"{len(clips)} held-out clips, gamma {config.gamma}",
    )
    facts = {"pair": setup.name, "auc": curves, "unsure_anchors": unsure}
    facts |= {"anchor_threshold": task.anchor_threshold}
    print(facts)
    figures = {"rows": rows, **facts, "clips": len(clips), "gamma": config.gamma}
    script.finish(arguments, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
