"""An anchor threshold set by hand: sweep quantiles of relevance on the calibration split.

    python bench/calibrate_embedded.py [--pair embedded] [--clips 96] [--gamma 12] [--json FILE]

What `anchor_threshold="auto"` finds is compared with the threshold that was chosen from this table
(`Task.anchor_threshold`): the cliff is steep, so that keeps a margin to the first that loses
captions.
"""

from __future__ import annotations

from measuring import script
from pairs import trained

from lvspec.config import DecodeConfig
from lvspec.shapes.calibration import area_under_curve, collect_scores, sweep
from lvspec.shapes.evaluation import MAX_NEW_TOKENS

QUANTILES = {
    "embedded": (0.78, 0.82, 0.84, 0.86, 0.88, 0.90, 0.92),
    "real": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
}
OTHERS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> int:
    parser = trained.parser_of(__doc__, clips=96)
    trained.add_pair(parser)
    parser.add_argument("--gamma", type=int, default=12)
    arguments, setup = trained.begin(parser)
    config = DecodeConfig(gamma=arguments.gamma, max_new_tokens=MAX_NEW_TOKENS)
    pair, token_anchors = setup.pair, setup.task.token_anchors
    clips = setup.clips("calibration", arguments.clips)
    curves = {}
    for scorer in ("attention_peak", "attention_mass"):
        scores, anchors = collect_scores(pair, clips, config, scorer, token_anchors)
        curves[scorer] = area_under_curve(scores, anchors)
        if scorer == "attention_peak":
            quantiles = QUANTILES.get(setup.name, OTHERS)
            thresholds = {f"q{q:.2f}": float(scores.quantile(q)) for q in quantiles}
    print(f"area under the curve: {curves}; anchors {float(anchors.float().mean()):.3f}")
    rows = sweep(pair, clips, config, thresholds)
    for row in rows:
        row["threshold"] = thresholds.get(row["method"])
    script.print_table(
        ("threshold", "quantile", "tau", "attributes", "captions", "speed-up"),
        [
            (
                "-" if row["threshold"] is None else f"{row['threshold']:.5f}",
                row["method"],
                f"{row['tau']:.2f}",
                f"{row['attributes']:.4f}",
                f"{row['captions']:.4f}",
                f"{row['speedup']:.2f}x strict",
            )
            for row in rows
        ],
    )
    script.finish(arguments, {"pair": setup.name, "auc": curves, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
