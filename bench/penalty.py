"""What a repetition penalty in the target's generation config costs on the embedded pair.

`python bench/penalty.py`: tau, tokens/s and fidelity of strict and loose decoding with the penalty
and without, all in one run, relative to the target's own captions under the same penalty.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from lvspec.config import DecodeConfig
from lvspec.environment import check_json_path, environment, write_json
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.evaluation import MAX_NEW_TOKENS, lvspec_method, make_clips, run_methods
from lvspec.shapes.pair import load_embedded_pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--penalty", type=float, default=1.05)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.json:
        check_json_path(arguments.json)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    pair = load_embedded_pair()
    pair.target.generation_config.repetition_penalty = arguments.penalty
    policies = {
        "autoregression": None,
        "strict": AcceptancePolicy.strict(),
        "lvspec": AcceptancePolicy.lvspec(),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(pair, "evaluation", arguments.clips, Path(folder))
        methods = {}
        for is_applied in (False, True):
            config = DecodeConfig(
                gamma=arguments.gamma,
                max_new_tokens=MAX_NEW_TOKENS,
                generation_config=is_applied,
            )
            for name, policy in policies.items():
                methods[name, is_applied] = lvspec_method(pair, policy, config)
        results = run_methods(methods, clips)
    for (name, is_applied), result in results.items():
        row = result.summary(clips, results["autoregression", is_applied])
        penalty = arguments.penalty if is_applied else None
        rows.append({**row, "method": name, "repetition_penalty": penalty})
    table = Table(title=f"{len(clips)} held-out clips, gamma {arguments.gamma}")
    for heading in ("method", "penalty", "tau", "tokens/s", "attributes", "captions", "regret"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        table.add_row(
            row["method"],
            "-" if row["repetition_penalty"] is None else f"{row['repetition_penalty']:g}",
            f"{row['tau']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['attributes']:.1%}",
            f"{row['captions']:.1%}",
            f"{row['regret']:.2f}",
        )
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, {"rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
