"""The model card's figures: accuracy of target and draft alone, and what a step of each costs.

    python bench/embedded_pair.py [--clips 200] [--json FILE]

A step is one forward over a slot cache behind a caption's prompt: one row of the draft, one row and
thirteen rows (gamma 12) of the target, the latter with scores. They take turns in runs of twelve,
as draft steps do in the loop; medians of 30 runs.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import torch
from measuring import script
from pairs import trained

from lvspec.config import DecodeConfig
from lvspec.evaluation.methods import lvspec_method
from lvspec.models.attention import lvspec_attention_on
from lvspec.models.inputs import check_inputs
from lvspec.models.loading import Pair
from lvspec.models.model import Model
from lvspec.shapes.evaluation import MAX_NEW_TOKENS, Clip, run_methods
from lvspec.tree import chain_ancestors


def step_milliseconds(pair: Pair, clip: Clip, rounds: int = 30, run: int = 12) -> dict[str, float]:
    """Median time of a draft step, a target step of one row, and one of thirteen rows."""
    cases = {
        "draft, 1 row": (Model(pair.draft, "draft"), 1, False),
        "target, 1 row": (Model(pair.target, "target"), 1, False),
        "target, 13 rows with scores": (Model(pair.target, "target"), 13, True),
    }
    steps = {}
    for name, (model, slots, scores) in cases.items():
        cache = model.new_cache(batch_size=1, capacity=256, num_slots=slots)
        model.prefill(check_inputs(model, clip.inputs), cache, 0)
        tokens = clip.inputs["input_ids"][:, -1:].expand(1, slots)
        depths, ancestors = torch.arange(slots), chain_ancestors(slots, batch_size=1)
        steps[name] = (model, (tokens, depths, ancestors, cache), scores)
    times: dict[str, list[float]] = {name: [] for name in cases}
    with lvspec_attention_on(pair.draft.model.language_model):
        with lvspec_attention_on(pair.target.model.language_model):
            for _ in range(rounds + 5):
                for name, (model, arguments, scores) in steps.items():
                    start = time.perf_counter()
                    for _ in range(run):
                        model.step(*arguments, scores=scores)
                    times[name].append((time.perf_counter() - start) / run)
    return {name: 1e3 * median(values[5:]) for name, values in times.items()}


@torch.inference_mode()
def main() -> int:
    arguments, setup = trained.begin(trained.parser_of(__doc__, clips=200))
    config = DecodeConfig(max_new_tokens=MAX_NEW_TOKENS)
    pair, clips = setup.pair, setup.clips("evaluation", arguments.clips)
    methods = {
        "target": lvspec_method(pair, None, config),
        "draft": lvspec_method(replace(pair, target=pair.draft), None, config),
    }
    results = run_methods(methods, clips)
    milliseconds = step_milliseconds(pair, clips[0])
    rows, lines = [], []
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        row = results[name].summary(clips, results["target"])
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        rows.append(row)
        figures = f"{row['parameters']:,}", f"{row['attributes']:.2%}", f"{row['captions']:.1%}"
        lines.append((name, *figures))
    script.print_table(("model", "parameters", "attributes", "captions"), lines)
    for name, value in milliseconds.items():
        print(f"{name}: {value:.2f} ms")
    ratio = milliseconds["draft, 1 row"] / milliseconds["target, 1 row"]
    print(f"draft step / target step: {ratio:.3f}")
    facts = {"milliseconds": milliseconds, "cost_ratio": ratio, "clips": len(clips)}
    script.finish(arguments, {"rows": rows, **facts})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
