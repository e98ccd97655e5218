"""Every way to draft, on held-out clips of a trained pair.

    python bench/drafters.py [--pair embedded] [--clips 24] [--gamma 12] [--only TEXT] [--json FILE]

Each row is a drafter with a policy: tau, drafted tokens per token that was emitted, tokens/s over
autoregression in the same run, and what of the target's attributes and whole captions is right.
"""

from __future__ import annotations

from collections.abc import Callable

from measuring import script
from pairs import trained

from lvspec import AnchorTree, DynamicTree, Generation, SkipTree, frequent_tokens
from lvspec.config import DecodeConfig
from lvspec.evaluation.methods import lvspec_method
from lvspec.models.loading import Pair
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.evaluation import MAX_NEW_TOKENS, Clip, MethodResult, run_methods

BASELINE = "autoregression"
Row = tuple[str, AcceptancePolicy | None, DecodeConfig, str | None]


def rows(
    gamma: int,
    captions: list[Generation],
    policies: dict[str, AcceptancePolicy | None],
) -> list[Row]:
    """(name, policy, config, draft) of every row; another way to draft is another line here.

    Args:
        gamma: As for `DecodeConfig`, of all rows but one that chooses.
        captions: The target's own, of other clips, whose tokens some drafts are limited to.
        policies: Who decides on drafts; that of `BASELINE`, None, drafts none.
    """

    def config(make: Callable[..., DecodeConfig] = DecodeConfig, **options: object) -> DecodeConfig:
        return make(**{"gamma": gamma, "max_new_tokens": MAX_NEW_TOKENS, **options})

    ways = [
        ("chain", config(), None),
        ("chain, gamma auto", config(gamma="auto"), None),
        ("specvlm", config(DecodeConfig.specvlm), None),
        ("specvlm's tree, all of the video", config(tree="specvlm"), None),
        ("dynamic tree 4x6", config(tree=DynamicTree(4, 6)), None),
        ("dynamic tree 2x12", config(tree=DynamicTree(2, 12)), None),
        ("anchor-stop chain", config(stop_at_unsure_anchors=0.7), None),
        ("anchor-branch tree", config(tree=AnchorTree(3, 3)), None),
        ("skip tree", config(tree=SkipTree()), None),
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
    return [(BASELINE, None, config(), None)] + [
        (f"{name}, {policy}", policies[policy], options, draft)
        for policy in policies
        if policy != BASELINE
        for name, options, draft in ways
    ]


def captions_of(pair: Pair, clips: list[Clip]) -> list[Generation]:
    """What the target says by itself."""
    method = lvspec_method(pair, None, DecodeConfig(max_new_tokens=MAX_NEW_TOKENS))
    return [method(clip).generation for clip in clips]


def summary(result: MethodResult, clips: list[Clip], baseline: MethodResult) -> dict[str, object]:
    """A row of the table with what was drafted for each token that was emitted."""
    drafted = sum(output.generation.stats.num_drafted for output in result.outputs)
    emitted = sum(output.tokens - 1 for output in result.outputs)  # the first is the prefill's
    return {**result.summary(clips, baseline), "drafted_per_token": drafted / emitted}


def main() -> int:
    parser = trained.parser_of(__doc__, clips=24)
    trained.add_pair(parser)
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in their name")
    arguments, setup = trained.begin(parser)
    pair, gamma = setup.pair, arguments.gamma
    clips = setup.clips("evaluation", arguments.clips)
    captions = captions_of(pair, setup.clips("training", 64))
    methods = {
        name: lvspec_method(pair, policy, config, draft=draft)
        for name, policy, config, draft in rows(gamma, captions, setup.policies())
        if name == BASELINE or arguments.only in name
    }
    results = run_methods(methods, clips)
    found = [summary(result, clips, results[BASELINE]) for result in results.values()]
    script.print_table(
        (
            *("drafter, policy", "gamma", "tau", "drafted/token"),
            *("speed-up", "decoding", "of target", "regret"),
        ),
        [
            (
                row["method"],
                " then ".join(map(str, row["gamma"])),
                f"{row['tau']:.2f}",
                f"{row['drafted_per_token']:.2f}",
                f"{row['speedup']:.2f}x",
                f"{row['decode_speedup']:.2f}x",
                script.of_target(row),
                f"{row['regret']:.2f}",
            )
            for row in found
        ],
        title=f"{len(clips)} held-out clips, gamma {gamma}",
    )
    facts = {"pair": setup.name, "clips": len(clips), "gamma": gamma}
    script.finish(arguments, {"rows": found, **facts})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
