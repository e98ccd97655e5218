"""Where the time of an iteration goes: kernels by time, and the gaps between them.

    python bench/profile_step.py [--pair qwen-7b-3b] [--context 16384] [--batch 1] [--json FILE]
        [--early]
    python bench/profile_step.py --device cpu --pair tiny --context 300

Runs whole iterations of a pair with random weights, as `e2e.py` does, under torch.profiler. On CUDA
they are replays of a graph: its kernels, their share, and how long the device does nothing between
two of them, and how many run in a layer, beside the number that was predicted. Beside that the
steps by themselves, from Python and captured: a pass of one row, the verify pass with scores, and
HF's own SDPA pass over a cache of the same length. With `--early` kernels of a pass are launched
before the one ahead has ended, which is off as long as no device has timed it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from e2e import overrides
from measuring import gaps, script, timing
from measuring.clock import synchronize
from ops.early import launch_early
from pairs import huggingface as hf
from pairs.expected import kernels_a_layer, prediction
from pairs.pairs import PAIRS, Size
from pairs.random_models import build
from pairs.replay import AcceptanceTrace, begin
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from lvspec import ops
from lvspec.config import DecodeConfig
from lvspec.engine.engine import Engine
from lvspec.environment import check_json_path
from lvspec.models.hf_names import CACHE
from lvspec.tree import chain_ancestors

WARM_UP = 6


def profiled(engine: Engine, iterations: int, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """(averages, Chrome trace) of whole iterations."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.inference_mode(), engine.attention():
        for _ in range(WARM_UP):
            engine.iterate()
        synchronize(device)
        with profile(activities=activities) as found:
            for _ in range(iterations):
                engine.iterate()
            synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        found.export_chrome_trace(str(path))
        return found.key_averages(), json.loads(path.read_text())


def times(call: Callable[[], Any], device: torch.device) -> dict[str, float | None]:
    """Median milliseconds from Python, and of a captured graph, None where that cannot be had."""
    calls = timing.measure(call, device, how="calls").median_ms
    if device.type != "cuda":
        return {"calls_ms": calls, "graph_ms": None}
    try:
        return {"calls_ms": calls, "graph_ms": timing.measure(call, device).median_ms}
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}")
        return {"calls_ms": calls, "graph_ms": None}


@torch.inference_mode()
def step_times(engine: Engine) -> dict[str, dict[str, float | None]]:
    """The models' passes by themselves, over the engine's caches."""
    device, cache = engine.target.device, engine.cache
    batch_size, slots = len(engine.places), engine.num_slots
    tokens = engine.state.last_two[:, 1:].repeat(1, slots)
    ancestors = chain_ancestors(slots, batch_size=batch_size, device=device)
    depths = torch.arange(slots, device=device)

    def step(model: Any, over: Any, rows: int, scores: bool) -> Callable[[], Any]:
        arguments = (tokens[:, :rows], depths[:rows], ancestors[:, :rows], over)
        return lambda: model.step(*arguments, scores=scores).logits

    drafter = engine.drafter
    steps = {
        "draft, 1 row": step(drafter.model, drafter.cache, 1, False),
        "target, 1 row": step(engine.target, cache, 1, False),
        f"target, {slots} rows, scores": step(engine.target, cache, slots, True),
    }
    with engine.attention():
        found = {name: times(call, device) for name, call in steps.items()}
    for rows in (1, slots):
        call = huggingface_step(engine, tokens[:, :rows])
        found[f"hf sdpa, {rows} rows"] = times(call, device)
    return found


def huggingface_step(engine: Engine, tokens: torch.Tensor) -> Callable[[], Any]:
    """HF's forward with SDPA over a DynamicCache of the same length, which every step leaves."""
    model, length = engine.target, int(engine.cache.kv_len.min())
    theirs = hf.dynamic_cache(model, engine.cache, length)
    positions = (length + torch.arange(tokens.shape[1], device=tokens.device)).expand(
        len(tokens), -1
    )
    if model.family.position_rows > 1:
        positions = positions.expand(model.family.position_rows, -1, -1)

    def call() -> torch.Tensor:
        hidden = model.text(
            input_ids=tokens, position_ids=positions, **{CACHE: theirs}, use_cache=True
        )
        theirs.crop(-tokens.shape[1])
        return model.hf.lm_head(hidden.last_hidden_state)

    return call


def show(value: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """Print what was found, which is in the file by then."""
    console = Console()
    console.print(
        f"{value['label']}, context {value['context']}, batch {value['batch']}, {device}, "
        f"{dtype}, {value['loop']}",
        markup=False,
        soft_wrap=True,
    )
    table = Table("step", "ms, calls", "ms, graph")
    for name, each in value["steps"].items():
        table.add_row(name, *("-" if ms is None else f"{ms:.3f}" for ms in each.values()))
    console.print(table)
    if device.type != "cuda":
        return
    found, a_layer, expected = value["gaps"], value["kernels_a_layer"], value["expected_kernels"]
    said = "not predicted"
    if expected is not None:
        said = f"{expected} expected, {expected / value['layer_passes']:.2f} a layer"
    console.print(
        f"{sum(a_layer.values()):.2f} kernels a layer and pass, those beside layers included "
        f"({said}):",
        soft_wrap=True,
    )
    for name, count in a_layer.items():
        if count >= 0.1:
            console.print(f"  {count:6.2f} {name[:90]}", markup=False, soft_wrap=True)
    within, of_all = (
        "not measured" if found[share] is None else f"{found[share]:.1%}"
        for share in ("share_within", "share_of_all")
    )
    console.print(
        f"gaps between kernels: {within} of an iteration, {of_all} of all "
        f"{value['iterations']}; {found['kernels_of_a_replay']} kernels a replay",
        soft_wrap=True,
    )


def main() -> int:
    parser = script.parser_of(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--pair", choices=PAIRS, default="qwen-7b-3b")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--iterations", type=int, default=3, help="under the profiler")
    parser.add_argument("--rows", type=int, default=25, help="of the profile")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="fields")
    parser.add_argument("--early", action="store_true", help="launch kernels early")
    parser.add_argument("--trace", type=Path, help="write the Chrome trace of the iterations")
    arguments = script.begin(parser)
    if arguments.trace:
        check_json_path(arguments.trace)
    device, pair = arguments.device, PAIRS[arguments.pair]
    label = pair.label
    if arguments.early:
        label += ", launched early"
        launch_early(True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = Size(arguments.context, arguments.batch)
    tokens = (WARM_UP + arguments.iterations + 4) * (arguments.gamma + 1)
    try:
        fields = {"gamma": arguments.gamma, **overrides(arguments.fields)}
        config = DecodeConfig(**{"max_new_tokens": tokens, "eos_ids": (), **fields})
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    models = [build(shape, device, dtype) for shape in (pair.target, pair.draft)]
    options = {"context": size.context, "batch_size": size.batch_size}
    trace = AcceptanceTrace.stored("lvspec")
    with torch.inference_mode():
        engine = begin(*models, config, trace=trace, **options)
    averages, chrome = profiled(engine, arguments.iterations, device)
    found, kernels = gaps.describe(chrome), gaps.by_kernel(gaps.work(chrome))
    loop = engine.runner.description
    depth = engine.drafter.depth
    layer_passes = pair.target.num_layers + depth * pair.draft.num_layers
    a_layer = kernels_a_layer(kernels, arguments.iterations, layer_passes)
    expected = prediction(pair.name, config.gamma)
    expected_kernels = None if expected is None else expected["kernels"]
    if arguments.trace:
        arguments.trace.write_text(json.dumps(chrome))
    value = {
        "kind": "profile",
        "pair": pair.name,
        "label": label,
        "context": size.context,
        "batch": size.batch_size,
        "gamma": config.gamma,
        "loop": loop,
        "parts": engine.parts,
        "steps": {},
        "gaps": found,
        "kernels": kernels[: arguments.rows],
        "kernels_a_layer": a_layer,
        "layer_passes": layer_passes,
        "expected_kernels": expected_kernels,
        "iterations": arguments.iterations,
        "backend": ops.active_backend(device.type),
        "limits": timing.device_facts(device),
    }
    script.finish(arguments, value, device)  # which stands, whatever becomes of the rest
    value["steps"] = step_times(engine)
    script.finish(arguments, value, device)
    show(value, device, dtype)
    order = "self_cpu_time_total" if device.type != "cuda" else "self_cuda_time_total"
    print(averages.table(sort_by=order, row_limit=arguments.rows, max_name_column_width=60))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
