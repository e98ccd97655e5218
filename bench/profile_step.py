"""Where the time of one verify pass goes, at a model's real size with random weights.

    python bench/profile_step.py [--model qwen2.5-vl-7b] [--layers 28] [--context 16384]

Times a step of one row (autoregression), of gamma + 1 rows with scores (verify), acceptance and
commit, and HF's own SDPA step over a cache of the same length; then prints torch.profiler's table
of the verify pass. Each is timed from Python, and on CUDA also captured in a graph where it can be:
the difference is what the host costs. The vision tower is at its smallest, for it is not run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
from cases import QWEN_3B, QWEN_7B, QWEN_32B, SMALL, Shape
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import (
    DynamicCache,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from lvspec import ops, tree
from lvspec.cache import SlotCache
from lvspec.config import FUSE
from lvspec.environment import check_json_path, environment, write_json
from lvspec.fused import Fuse
from lvspec.models import Model
from lvspec.policy import AcceptancePolicy
from lvspec.relevance import get_scorer

MODELS = {shape.name: shape for shape in (QWEN_3B, QWEN_7B, QWEN_32B, SMALL)}


def build(shape: Shape, layers: int, device: torch.device, dtype: torch.dtype, fuse: Fuse) -> Model:
    """Qwen2.5-VL of this shape with random weights."""
    hidden = shape.num_q_heads * shape.head_dim
    sections = [shape.head_dim // 8, 3 * shape.head_dim // 16, 3 * shape.head_dim // 16]
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": layers,
            "layer_types": ["full_attention"] * layers,
            "num_attention_heads": shape.num_q_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "vocab_size": shape.vocabulary,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": sections,
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [0],
        },
        image_token_id=3,
        video_token_id=4,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            hf = Qwen2_5_VLForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    return Model(hf, "target", fuse=fuse)


def filled_cache(model: Model, context: int, num_slots: int) -> SlotCache:
    """A cache as after the prefill of one long video, with random keys and values."""
    cache = model.new_cache(batch_size=1, capacity=context + 512, num_slots=num_slots)
    cache.k[..., :context, :].normal_()
    cache.v[..., :context, :].normal_()
    visual = torch.zeros(context, dtype=torch.bool, device=model.device)
    visual[15 : context - 40] = True
    positions = torch.arange(context, device=model.device).expand(3, -1)
    cache.finish_prefill(0, positions, visual)
    return cache


def huggingface_step(model: Model, cache: SlotCache, tokens: torch.Tensor) -> Callable[[], Any]:
    """HF's forward with SDPA over a DynamicCache of the same length, which every step leaves."""
    length = int(cache.kv_len)
    theirs = DynamicCache()
    for layer in range(cache.k.shape[0]):
        theirs.update(
            cache.k[layer, :, :, :length].clone(), cache.v[layer, :, :, :length].clone(), layer
        )
    positions = length + torch.arange(tokens.shape[1], device=tokens.device)
    positions = positions.expand(3, 1, -1)

    def call() -> torch.Tensor:
        hidden = model.text(
            input_ids=tokens, position_ids=positions, past_key_values=theirs, use_cache=True
        )
        theirs.crop(-tokens.shape[1])
        return model.hf.lm_head(hidden.last_hidden_state)

    return call


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
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--model", choices=MODELS, default=QWEN_7B.name)
    parser.add_argument("--layers", type=int, help="default: all of the model's")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--rows", type=int, default=25, help="of the profile")
    parser.add_argument("--fuse", choices=FUSE, default="kernels", help="see DecodeConfig.fuse")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path, help="write a Chrome trace of the verify pass")
    arguments = parser.parse_args()
    if arguments.json:
        check_json_path(arguments.json)
    device, shape = arguments.device, MODELS[arguments.model]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers = arguments.layers or shape.num_layers
    num_slots = arguments.gamma + 1
    model = build(shape, layers, device, dtype, arguments.fuse)
    cache = filled_cache(model, arguments.context, num_slots)
    tokens = torch.randint(8, shape.vocabulary, (1, num_slots), device=device)
    depths = torch.arange(num_slots, device=device)
    ancestors = tree.chain_ancestors(num_slots, batch_size=1, device=device)
    parents = tree.chain_parents(num_slots, batch_size=1, device=device)
    slots = torch.full((1,), num_slots, dtype=torch.int32, device=device)
    scorer, policy = get_scorer("attention_peak"), AcceptancePolicy.lvspec(eos_ids=(2,))

    def one_row() -> Any:
        return model.step(tokens[:, :1], depths[:1], ancestors[:, :1], cache).logits

    def verify() -> Any:
        output = model.step(tokens, depths, ancestors, cache, scores=True)
        return output.logits, scorer(output)

    with model.active():
        logits, relevance = verify()

    def accept_and_commit() -> Any:
        stats = ops.logit_stats(logits, top_k=policy.needed_top_k)
        found = ops.accept(logits, tokens, parents, slots, stats, relevance, policy)
        ops.commit_kv(cache.k, cache.v, cache.kv_len, found.path, found.num_accepted)
        return found

    console = Console()
    steps: dict[str, dict[str, float | None]] = {}
    with model.active():
        steps["1 row"] = times(one_row, device)
        steps[f"{num_slots} rows, scores"] = times(verify, device)
        steps["statistics, accept, commit"] = times(accept_and_commit, device)
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(device)
        with profile(activities=activities) as profiled:
            verify()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    for count in (1, num_slots):
        call = huggingface_step(model, cache, tokens[:, :count])
        steps[f"hf sdpa, {count} rows"] = times(call, device)

    table = Table("step", "ms, calls", "ms, graph")
    for name, found in steps.items():
        table.add_row(name, *("-" if ms is None else f"{ms:.3f}" for ms in found.values()))
    console.print(f"{shape.name}, {layers} layers, context {arguments.context}, {device}, {dtype}")
    console.print(table)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    averages = profiled.key_averages()
    print(averages.table(sort_by=order, row_limit=arguments.rows, max_name_column_width=60))
    if arguments.trace:
        profiled.export_chrome_trace(str(arguments.trace))
    if arguments.json:
        value = {
            "model": shape.name,
            "layers": layers,
            "context": arguments.context,
            "gamma": arguments.gamma,
            "fuse": arguments.fuse,
            "steps": steps,
            "backend": ops.active_backend(device.type),
            "limits": timing.device_facts(device),
            "environment": environment(device),
        }
        write_json(arguments.json, value)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
