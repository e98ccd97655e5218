"""What a target loses whose weights, or whose keys and values, are fp8.

    python bench/float8.py [--pair embedded|real|FOLDER] [--clips 24] [--gamma 12] [--json FILE]

Tau and fidelity of a trained pair whose target holds its weights (the head's not, or those too),
its caches or all of them in float8, strict and loose. Captions are judged by what the clips show
and compared, word for word, with what the target says by itself with nothing rounded.
"""

from __future__ import annotations

import copy
import dataclasses

from measuring import script
from pairs import trained

from lvspec.config import DecodeConfig
from lvspec.evaluation.methods import lvspec_method
from lvspec.models.quantize import quantize
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.evaluation import MAX_NEW_TOKENS, run_methods

AS_IT_IS = "as it is"


def main() -> None:
    parser = trained.parser_of(__doc__, clips=24)
    trained.add_pair(parser)
    parser.add_argument("--gamma", type=int, default=12)
    arguments, setup = trained.begin(parser)
    plain = setup.pair
    target = quantize(copy.deepcopy(plain.target), "fp8", head=False)
    weights = dataclasses.replace(plain, target=target)
    with_head = dataclasses.replace(plain, target=quantize(copy.deepcopy(plain.target), "fp8"))
    held = {
        AS_IT_IS: (plain, "auto"),
        "weights": (weights, "auto"),
        "weights, head": (with_head, "auto"),
        "caches": (plain, "fp8"),
        "weights, caches": (weights, "fp8"),
    }
    policies = {"strict": AcceptancePolicy.strict(), "lvspec": AcceptancePolicy.lvspec()}
    methods = {}
    for name, (pair, cache_dtype) in held.items():
        config = DecodeConfig(
            gamma=arguments.gamma, max_new_tokens=MAX_NEW_TOKENS, cache_dtype=cache_dtype
        )
        for policy in policies:
            methods[name, policy] = lvspec_method(pair, policies[policy], config)
    clips = setup.clips("evaluation", arguments.clips)
    results = run_methods(methods, clips)
    reference = results[AS_IT_IS, "strict"]  # what the target says by itself
    rows = []
    for (name, policy), result in results.items():
        pairs = zip(result.outputs, reference.outputs, strict=True)
        same = sum(mine.tokens == theirs.tokens for mine, theirs in pairs)
        row = result.summary(clips, reference)
        rows.append({**row, "float8": name, "method": policy, "same": same / len(clips)})
    script.print_table(
        ("float8", "policy", "tau", "attributes", "captions", "same words"),
        [
            (
                row["float8"],
                row["method"],
                f"{row['tau']:.2f}",
                f"{row['attributes']:.1%}",
                f"{row['captions']:.1%}",
                f"{row['same']:.0%}",
            )
            for row in rows
        ],
        title=f"{len(clips)} held-out clips, gamma {arguments.gamma}",
    )
    script.finish(arguments, {"rows": rows, "pair": setup.name})


if __name__ == "__main__":
    main()
