"""The embedded pair on a device: tokens per second, tau and fidelity of every method.

`lvspec demo` does this on the CPU with one thread. The models are so small that on a GPU launches
cost more than arithmetic: what this shows there is that the whole loop is right, and what the host
adds to it.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lvspec.config import DecodeConfig
from lvspec.engine.api import generate
from lvspec.environment import environment
from lvspec.evaluation.methods import huggingface_method, lvspec_method
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.evaluation import MAX_NEW_TOKENS, Clip, make_clips, run_methods
from lvspec.shapes.pair import load_embedded_pair

TRACED = ("lvspec", "strict")


def moved(clip: Clip, device: torch.device, dtype: torch.dtype) -> Clip:
    """The clip with its inputs on the device, pixels in the models' dtype."""
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in clip.inputs.items()
    }
    return replace(clip, inputs=inputs)


def embedded_rows(
    config: DecodeConfig, count: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Every method on `count` held-out clips, in the order of the table."""
    config = replace(config, max_new_tokens=MAX_NEW_TOKENS)
    pair = load_embedded_pair(dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(pair, "evaluation", count, Path(folder))
    clips = [moved(clip, device, dtype) for clip in clips]
    eager = replace(config, capture=False)
    methods = {
        "autoregression": lvspec_method(pair, None, config),
        "hf generate": huggingface_method(pair, max_new_tokens=MAX_NEW_TOKENS, assisted=False),
        "hf assisted": huggingface_method(pair, max_new_tokens=MAX_NEW_TOKENS, assisted=True),
        "strict": lvspec_method(pair, AcceptancePolicy.strict(), config),
        "fly": lvspec_method(pair, AcceptancePolicy.fly(), config),
        "lvspec": lvspec_method(pair, AcceptancePolicy.lvspec(), config),
        "lvspec eager": lvspec_method(pair, AcceptancePolicy.lvspec(), eager),
    }
    results = run_methods(methods, clips)
    rows = [result.summary(clips, results["autoregression"]) for result in results.values()]

    def equal(one: str, other: str) -> int:
        outputs = zip(results[one].outputs, results[other].outputs, strict=True)
        return sum(a.text == b.text for a, b in outputs)

    return {
        "rows": rows,
        "clips": count,
        "dtype": str(dtype).removeprefix("torch."),
        "strict_equals_hf": equal("strict", "hf generate"),
        "captured_equals_eager": equal("lvspec", "lvspec eager"),
    }


def embedded_table(found: dict[str, Any]) -> Table:
    clips = found["clips"]
    table = Table(
        *("method", "tokens/s", "speed-up", "tau", "attributes", "captions"),
        title=f"embedded pair, {found['dtype']}",
        caption=f"strict says what hf generate says on {found['strict_equals_hf']} of {clips} "
        f"clips, lvspec what it says uncaptured on {found['captured_equals_eager']}",
    )
    for row in found["rows"]:
        figures = [f"{row['tokens_per_s']:.0f}", f"{row['speedup']:.2f}x", f"{row['tau']:.2f}"]
        table.add_row(row["method"], *figures, f"{row['attributes']:.1%}", f"{row['captions']:.1%}")
    return table


def measure_traces(config: DecodeConfig, count: int) -> dict[str, Any]:
    """`num_accepted` of every iteration of the embedded pair, clip by clip, for `replay.py`.

    The last iteration of a clip is left out: what it accepts lies behind the end of the caption.
    """
    config = replace(config, max_new_tokens=MAX_NEW_TOKENS)
    pair = load_embedded_pair()
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(pair, "evaluation", count, Path(folder))
    traces = {}
    for name in TRACED:
        policy = AcceptancePolicy.preset(name)
        accepted: list[int] = []
        for clip in clips:
            result = generate(pair.target, pair.draft, clip.inputs, policy=policy, config=config)
            accepted += result.stats.num_accepted[:-1]
        tau = sum(accepted) / len(accepted) + 1
        traces[name] = {"tau": tau, "num_accepted": accepted}
    return {
        "pair": "embedded",
        "gamma": config.gamma,
        "clips": count,
        "traces": traces,
        "environment": environment(),
    }
