"""End to end on a device: the embedded pair's real tokens, and pairs of real shapes.

    python bench/e2e.py [embedded] [pairs] [--pair qwen-7b-3b ...] [--context 16384 ...]
        [--batch 1 8] [--budget 500] [--set fuse=none] [--compile] [--json FILE]
    python bench/e2e.py --device cpu --pair tiny        the same code in seconds
    python bench/e2e.py trace                           measure the acceptance that is replayed

Real shapes have random weights (`pairs/random_models.py`), which accept nothing: acceptance is
replayed from a trace of the embedded pair, or from one made for `--tau`. What such a row says is
what an iteration takes, beside the limit of its bytes, and which speed-up follows at that tau.
Methods and peers, by the same weights in the same run, are in `pairs/measure.py`.

The first size of every pair comes first, and our methods of all rows come before the peers;
`--compile` adds HF's compiled static cache, for the first pair alone. The JSON is written after
every method, and the same command goes on with what stands there: an interrupt loses nothing but
the method that it meets. When `--budget` seconds are over nothing new is begun, and what was not
reached says so.
"""

from __future__ import annotations

import ast
from dataclasses import asdict
from typing import Any

import torch
from measuring import script, timing
from measuring.clock import Budget, release
from ops.cases import Shape
from pairs.e2e_report import Report, open_methods
from pairs.measure import COMPILED, OURS, OUT_OF_TIME, PEERS, measure_row
from pairs.pairs import (
    BATCH_SIZES,
    CONTEXTS,
    PAIRS,
    REAL,
    Pair,
    Size,
    does_not_fit,
    free_bytes,
    needed_bytes,
    sizes,
)
from pairs.random_models import build
from pairs.replay import TRACES, AcceptanceTrace
from pairs.row import Plan, Row
from transformers import PreTrainedModel

from lvspec import ops
from lvspec.config import DecodeConfig
from lvspec.environment import environment, write_json
from lvspec.models.head import draft_head
from lvspec.models.model import Model
from lvspec.models.quantize import WEIGHTS, quantize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("embedded", "pairs", "trace")


def overrides(words: list[str]) -> dict[str, Any]:
    """Fields of `DecodeConfig` from words such as `gamma=8` or `fuse=none`.

    Raises:
        ValueError: A word has no `=`, or the field is unknown.
    """
    found = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in DecodeConfig.__dataclass_fields__:
            raise ValueError(f"--set: expected FIELD=VALUE of DecodeConfig, got {word!r}")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def shape_facts(model: Model, shape: Shape, vocabulary: tuple[int, ...] | None) -> dict[str, Any]:
    """What a model of a row is, and the weights that a pass of it reads."""
    head = draft_head(model.hf.lm_head, model.vocab_size, vocabulary)
    read = model.step_bytes_with(head)
    return {"label": shape.label, "pass_gb": read / 1e9, "shape": asdict(shape)}


def draft_label(weights: str | None, vocabulary: int | None) -> str:
    """What a draft is besides its shape, for the label of its rows."""
    words = [weights] if weights else []
    words += [f"{vocabulary} ids"] if vocabulary else []
    return f" ({', '.join(words)})" if words else ""


def run_pair(
    pair: Pair,
    chosen: list[Size],
    names: list[str],
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    budget: Budget,
    report: Report,
    draft_weights: str | None = None,
) -> None:
    """These methods at all sizes of a pair, which is built once, if any of them is to be run."""
    vocabulary = plan.config.draft_vocab
    label = pair.label + draft_label(draft_weights, len(vocabulary or ()))
    common = {"pair": pair.name, "label": label, "gamma": plan.config.gamma}
    tokens, item = plan.config.max_new_tokens + 64, dtype.itemsize
    release(device)
    free = free_bytes(device)
    models: list[PreTrainedModel] = []
    refused: str | None = None
    for size in chosen:
        found = report.row({**common, "context": size.context, "batch": size.batch_size})
        wanted = open_methods(found, names)
        if not wanted:
            continue
        needed = needed_bytes(pair, size, tokens=tokens, itemsize=item)
        reason = (
            refused or does_not_fit(needed, free) or (OUT_OF_TIME if budget.left <= 0 else None)
        )
        if reason is None and not models:
            models = [build(shape, device, dtype) for shape in (pair.target, pair.draft)]
            try:
                if draft_weights is not None:
                    quantize(models[1], draft_weights)
            except (ImportError, ValueError) as error:
                reason = refused = str(error)
        if reason is not None:
            report.refuse(found, wanted, reason)
            continue
        row = Row(*models, pair, size, plan)
        found |= {
            "dtype": str(dtype).removeprefix("torch."),
            "target": shape_facts(row.target, pair.target, None),
            "draft": shape_facts(row.draft, pair.draft, vocabulary),
            "replayed": f"replayed tau = {plan.trace.tau:.2f} ({plan.trace.name})",
            "needed_gb": needed / 1e9,
            "fuse": plan.config.fuse,
        }
        measure_row(row, budget, wanted, found, report.write)
        report.show(found, wanted)


def main() -> int:
    parser = script.parser_of(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("parts", nargs="*", help="embedded, pairs (default: both), trace")
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, on a CPU float32")
    parser.add_argument("--pair", nargs="+", choices=PAIRS, default=REAL, dest="pairs")
    parser.add_argument("--context", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCH_SIZES))
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--trace", default="lvspec", help="of bench/traces: lvspec or strict")
    parser.add_argument("--tau", type=float, help="a synthetic trace of this tau instead")
    parser.add_argument("--iterations", type=int, default=20, help="timed, of every method")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--compile", action="store_true", help="HF's static cache too, minutes")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="fields")
    parser.add_argument("--draft-weights", choices=WEIGHTS, help="of fewer bytes, by torchao")
    parser.add_argument("--draft-vocab", type=int, help="ids that the drafts may propose")
    parser.add_argument("--clips", type=int, default=12, help="of the embedded pair")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds")
    arguments = script.begin(parser)
    budget = Budget(arguments.budget)
    parts = arguments.parts or ["embedded", "pairs"]
    for part in parts:
        if part not in PARTS:
            parser.error(f"expected some of {', '.join(PARTS)}, got {part}")
    try:
        fields = overrides(arguments.fields)
        if arguments.tau is None:
            trace = None if "trace" in parts else AcceptanceTrace.stored(arguments.trace)
        else:
            trace = AcceptanceTrace.synthetic(arguments.tau)
        if arguments.draft_vocab is not None:  # weights are random, so any ids will do
            fields["draft_vocab"] = tuple(range(arguments.draft_vocab))
        config = DecodeConfig(**{"gamma": arguments.gamma, **fields})
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    device = arguments.device
    is_cuda = device.type == "cuda"
    if "trace" in parts:
        from pairs.embedded import measure_traces

        write_json(TRACES / "embedded-gamma12.json", measure_traces(config, arguments.clips))
        return 0
    document = {
        "kind": "e2e",
        "gamma": config.gamma,
        "set": {name: value for name, value in fields.items() if name != "draft_vocab"},
        "options": {
            "dtype": arguments.dtype,
            "trace": trace.name,
            "tau": trace.tau,
            "iterations": arguments.iterations,
            "clips": arguments.clips,
        },
        "backend": ops.active_backend(device.type),
        "limits": timing.device_facts(device),
        "environment": environment(device),
    }
    report = Report(arguments.json, document)
    if "embedded" in parts:
        dtype = DTYPES[arguments.dtype or "float32"]
        report.embedded(config, arguments.clips, device, dtype)
    if "pairs" in parts:
        plan = Plan.of(config, trace, arguments.iterations)
        dtype = DTYPES[arguments.dtype or ("bfloat16" if is_cuda else "float32")]
        first, *others = sizes(arguments.context, arguments.batch)
        # A pair is built again for the rest, which costs less than a pair without a row.
        for names in [OURS] if arguments.no_peers else [OURS, PEERS]:
            for chosen in ([first], others):
                for index, name in enumerate(arguments.pairs if chosen else ()):
                    compiled = arguments.compile and names is PEERS and chosen == [first]
                    methods = [*names, *([COMPILED] if compiled and index == 0 else [])]
                    run_pair(
                        PAIRS[name],
                        chosen,
                        methods,
                        plan,
                        device,
                        dtype,
                        budget,
                        report,
                        arguments.draft_weights,
                    )
    return int(report.failed)


if __name__ == "__main__":
    raise SystemExit(main())
