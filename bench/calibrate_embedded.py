"""Which anchor threshold ships: sweep quantiles of relevance on the calibration split.

    python bench/calibrate_embedded.py [--pair embedded] [--clips 96] [--gamma 12] [--json FILE]

The shipped `lvspec.policy.DEFAULT_ANCHOR_THRESHOLD` is chosen from this table by hand: the cliff is
steep, so it keeps a margin to the first threshold that loses captions.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from pairs.choice import choose
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from lvspec.config import DecodeConfig
from lvspec.environment import check_json_path, environment, write_json
from lvspec.shapes.calibration import area_under_curve, collect_scores, sweep
from lvspec.shapes.evaluation import MAX_NEW_TOKENS

QUANTILES = {
    "embedded": (0.78, 0.82, 0.84, 0.86, 0.88, 0.90, 0.92),
    "real": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
}
OTHERS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--pair", default="embedded", dest="name", help="embedded, real or a folder"
    )
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name = arguments.name
    try:
        task = choose(name)
    except ValueError as error:
        parser.error(str(error))
    if arguments.json:
        check_json_path(arguments.json)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    config = DecodeConfig(gamma=arguments.gamma, max_new_tokens=MAX_NEW_TOKENS)
    pair = task.load()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        clips = task.make_clips(pair, "calibration", arguments.clips, Path(folder))
        curves = {}
        for scorer in ("attention_peak", "attention_mass"):
            scores, anchors = collect_scores(pair, clips, config, scorer, task.token_anchors)
            curves[scorer] = area_under_curve(scores, anchors)
            if scorer == "attention_peak":
                quantiles = QUANTILES.get(name, OTHERS)
                thresholds = {f"q{q:.2f}": float(scores.quantile(q)) for q in quantiles}
        console.print(
            f"area under the curve: {curves}; anchors {float(anchors.float().mean()):.3f}"
        )
        rows = sweep(pair, clips, config, thresholds)
    table = Table("threshold", "quantile", "tau", "attributes", "captions", "speed-up")
    for row in rows:
        threshold = thresholds.get(row["method"])
        row["threshold"] = threshold
        table.add_row(
            "-" if threshold is None else f"{threshold:.5f}",
            row["method"],
            f"{row['tau']:.2f}",
            f"{row['attributes']:.4f}",
            f"{row['captions']:.4f}",
            f"{row['speedup']:.2f}x strict",
        )
    console.print(table)
    if arguments.json:
        value = {"pair": name, "auc": curves, "rows": rows, "environment": environment()}
        write_json(arguments.json, value)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
