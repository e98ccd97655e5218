"""Drafts that insert, leave out or swap words: shifts against skip trees, on the embedded pair.

    python bench/shifts.py [--clips 24] [--gamma 12] [--every 6] [--margin 1] [--json FILE]

Each row is a draft (`bench/pairs/shifted_drafts.py`) with a policy and a way to draft: tau, what of
the target's attributes and whole captions is right, the regret of a caption in nats, captions that
are the target's word for word, and tokens/s. Words are changed by the host, so compare tokens/s
within one draft alone.
"""

from __future__ import annotations

from measuring import script
from pairs import trained
from pairs.shifted_drafts import KINDS, Shifts, shifted

from lvspec import SkipTree
from lvspec.config import DecodeConfig
from lvspec.evaluation.methods import lvspec_method
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.evaluation import MAX_NEW_TOKENS, run_methods

BASELINE = "autoregression"
OWN = "the pair's own"


def main() -> int:
    parser = trained.parser_of(__doc__, clips=24)
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--every", type=int, default=6, help="one of so many rows is changed")
    parser.add_argument("--margin", type=float, default=1.0, help="nats that a changed row gains")
    parser.add_argument("--branches", type=int, default=6, help="of the skip trees")
    parser.add_argument("--nodes", type=int, default=36, help="of their branches")
    parser.add_argument("--only", default="", metavar="TEXT", help="drafts with this in their name")
    arguments, setup = trained.begin(parser)
    pair, strict = setup.pair, setup.policies()["strict"]
    plain = DecodeConfig(gamma=arguments.gamma, max_new_tokens=MAX_NEW_TOKENS)
    tree = SkipTree(arguments.branches, arguments.nodes)
    skipping = DecodeConfig(gamma=arguments.gamma, max_new_tokens=MAX_NEW_TOKENS, tree=tree)
    unshifted, shipped = AcceptancePolicy.lvspec(shift_window=0), AcceptancePolicy.lvspec()
    ways = {
        "strict": (strict, plain),
        "strict, skip tree": (strict, skipping),
        "lvspec without shifts": (unshifted, plain),
        f"lvspec, shift_window={shipped.shift_window}": (shipped, plain),
        "lvspec without shifts, skip tree": (unshifted, skipping),
        f"lvspec, shift_window={shipped.shift_window}, skip tree": (shipped, skipping),
    }
    methods = {(OWN, BASELINE): lvspec_method(pair, None, plain)}
    for kind in (None, *KINDS):
        shifts, options = None, {"every": arguments.every, "margin": arguments.margin}
        if kind is not None:
            shifts = Shifts.of_embedded(pair, kind, **options)
        if arguments.only in (kind or OWN):
            with shifted(shifts):
                for way, given in ways.items():
                    methods[kind or OWN, way] = lvspec_method(pair, *given)
    clips = setup.clips("evaluation", arguments.clips)
    results = run_methods(methods, clips)
    baseline = results[OWN, BASELINE]
    rows = []
    for (draft, way), result in results.items():
        pairs = zip(result.outputs, baseline.outputs, strict=True)
        same = sum(mine.text == theirs.text for mine, theirs in pairs) / len(clips)
        found = result.summary(clips, baseline)
        rows.append(
            {**found, "method": f"{draft}: {way}", "draft": draft, "way": way, "same": same}
        )
    script.print_table(
        ("draft: policy and way", "tau", "of target", "regret", "same", "tokens/s"),
        [
            (
                row["method"],
                f"{row['tau']:.2f}",
                script.of_target(row),
                f"{row['regret']:.2f}",
                f"{row['same']:.0%}",
                f"{row['tokens_per_s']:.0f}",
            )
            for row in rows
        ],
        title=f"{len(clips)} held-out clips, gamma {arguments.gamma}, one row in {arguments.every} "
        f"changed, by {arguments.margin:g} nats",
    )
    facts = {"pair": setup.name, "clips": len(clips), "gamma": arguments.gamma, "tree": str(tree)}
    facts |= {"every": arguments.every, "margin": arguments.margin}
    script.finish(arguments, {"rows": rows, **facts})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
