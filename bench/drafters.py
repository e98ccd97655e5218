"""Every way to draft, on held-out clips of the embedded pair.

    python bench/drafters.py [--clips 24] [--gamma 12] [--only TEXT] [--json FILE]

Each row is a drafter with a policy: tau, drafted tokens per token that was emitted, tokens/s over
autoregression in the same run, and what of the target's attributes and whole captions is right.
The cost ratio of the adaptive rows is measured first: the time of a draft step in that of a verify
pass.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from lvspec import AnchorTree, DynamicTree, Generation, frequent_tokens
from lvspec.config import DecodeConfig
from lvspec.environment import check_json_path, environment, write_json
from lvspec.models.loading import Pair
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.evaluation import (
    MAX_NEW_TOKENS,
    Clip,
    MethodResult,
    lvspec_method,
    make_clips,
    run_methods,
)
from lvspec.shapes.pair import load_embedded_pair

BASELINE = "autoregression"
Row = tuple[str, AcceptancePolicy | None, DecodeConfig, str | None]


def rows(gamma: int, cost_ratio: float, captions: list[Generation]) -> list[Row]:
    """(name, policy, config, draft) of every row; another way to draft is another line here.

    Args:
        gamma, cost_ratio: As for `DecodeConfig`.
        captions: The target's own, of other clips, whose tokens some drafts are limited to.
    """
    strict, lvspec = AcceptancePolicy.strict(), AcceptancePolicy.lvspec()

    def config(make: Callable[..., DecodeConfig] = DecodeConfig, **options: object) -> DecodeConfig:
        return make(gamma=gamma, max_new_tokens=MAX_NEW_TOKENS, **options)

    ways = [
        ("chain", config(), None),
        ("specvlm", config(DecodeConfig.specvlm), None),
        ("specvlm's tree, all of the video", config(tree="specvlm"), None),
        ("dynamic tree 4x6", config(tree=DynamicTree(4, 6)), None),
        ("dynamic tree 2x12", config(tree=DynamicTree(2, 12)), None),
        ("adaptive chain", config(adaptive=True, cost_ratio=cost_ratio), None),
        ("anchor-stop chain", config(stop_at_unsure_anchors=0.7), None),
        ("anchor-branch tree", config(tree=AnchorTree(3, 3)), None),
        *(
            (f"chain, {len(ids)} tokens", config(draft_vocab=ids), None)
            for ids in (frequent_tokens(captions, count) for count in (256, 80))
        ),
        ("half of the video", config(draft_keep=0.5), None),
        ("a tenth of the video", config(draft_keep=0.1), None),
        ("a tenth, uniform", config(draft_keep=0.1, draft_keep_by="uniform"), None),
        ("chain, n-grams for the draft", config(draft_ngram=3), None),
        ("self, half of the video", config(draft_keep=0.5), "self"),
        ("self, a tenth of the video", config(draft_keep=0.1), "self"),
        ("n-grams", config(), "ngram"),
    ]
    policies = {"strict": strict, "lvspec": lvspec}
    return [(BASELINE, None, config(), None)] + [
        (f"{name}, {policy}", policies[policy], options, draft)
        for policy in policies
        for name, options, draft in ways
    ]


def captions_of(pair: Pair, clips: list[Clip]) -> list[Generation]:
    """What the target says by itself."""
    method = lvspec_method(pair, None, DecodeConfig(max_new_tokens=MAX_NEW_TOKENS))
    return [method(clip).generation for clip in clips]


def measure_cost_ratio(pair: Pair, clip: Clip, gamma: int) -> float:
    """Time of a draft step over that of a verify pass, from a chain on one clip."""
    config = DecodeConfig(gamma=gamma, max_new_tokens=MAX_NEW_TOKENS)
    method = lvspec_method(pair, AcceptancePolicy.strict(), config)
    method(clip)  # recorded here
    seconds = method(clip).generation.stats.seconds
    return seconds["draft"] / gamma / seconds["verify"]


def summary(result: MethodResult, clips: list[Clip], baseline: MethodResult) -> dict[str, object]:
    """A row of the table with what was drafted for each token that was emitted."""
    drafted = sum(output.generation.stats.num_drafted for output in result.outputs)
    emitted = sum(output.tokens - 1 for output in result.outputs)  # the first is the prefill's
    return {**result.summary(clips, baseline), "drafted_per_token": drafted / emitted}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in their name")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.json:
        check_json_path(arguments.json)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    pair = load_embedded_pair()
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(pair, "evaluation", arguments.clips, Path(folder))
        captions = captions_of(pair, make_clips(pair, "training", 64, Path(folder)))
        cost_ratio = measure_cost_ratio(pair, clips[0], arguments.gamma)
        methods = {
            name: lvspec_method(pair, policy, config, draft=draft)
            for name, policy, config, draft in rows(arguments.gamma, cost_ratio, captions)
            if name == BASELINE or arguments.only in name
        }
        results = run_methods(methods, clips)
    found = [summary(result, clips, results[BASELINE]) for result in results.values()]
    table = Table(
        title=f"{len(clips)} held-out clips, gamma {arguments.gamma}, a draft step is "
        f"{cost_ratio:.2f} verify passes"
    )
    headings = (
        "drafter, policy",
        "tau",
        "drafted/token",
        "speed-up",
        "decoding",
        "of target",
        "regret",
    )
    for heading in headings:
        first = heading == "drafter, policy"
        table.add_column(heading, justify="left" if first else "right", no_wrap=True)
    for row in found:
        fidelity = row["fidelity"]
        table.add_row(
            row["method"],
            f"{row['tau']:.2f}",
            f"{row['drafted_per_token']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['decode_speedup']:.2f}x",
            f"{fidelity['attributes']:.2%} / {fidelity['captions']:.1%}",
            f"{row['regret']:.2f}",
        )
    Console().print(table)
    if arguments.json:
        facts = {"clips": len(clips), "gamma": arguments.gamma, "cost_ratio": cost_ratio}
        write_json(arguments.json, {"rows": found, **facts, "environment": environment()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
