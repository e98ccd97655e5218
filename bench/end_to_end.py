"""The embedded pair on a device: tokens per second, tau and fidelity of every method, side by side.

    python bench/end_to_end.py [--device cuda] [--dtype float32] [--clips 12] [--json FILE]

`lvspec demo` does this on the CPU with one thread. The models are so small that on a GPU launches
cost more than arithmetic: what this shows there is that the whole loop is right, and what the host
adds to it. `profile_step.py` has the sizes of real models.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from lvspec import ops
from lvspec.config import DecodeConfig
from lvspec.environment import check_json_path, environment, write_json
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.evaluation import (
    MAX_NEW_TOKENS,
    Clip,
    huggingface_method,
    lvspec_method,
    make_clips,
    run_methods,
)
from lvspec.shapes.pair import load_embedded_pair

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def moved(clip: Clip, device: torch.device, dtype: torch.dtype) -> Clip:
    """The clip with its inputs on the device, pixels in the models' dtype."""
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in clip.inputs.items()
    }
    return replace(clip, inputs=inputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.json:
        check_json_path(arguments.json)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    device, dtype = arguments.device, DTYPES[arguments.dtype]
    config = DecodeConfig(gamma=arguments.gamma, max_new_tokens=MAX_NEW_TOKENS)
    pair = load_embedded_pair(dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(pair, "evaluation", arguments.clips, Path(folder))
    clips = [moved(clip, device, dtype) for clip in clips]
    methods = {
        "autoregression": lvspec_method(pair, None, config),
        "hf generate": huggingface_method(pair, assisted=False),
        "hf assisted": huggingface_method(pair, assisted=True),
        "strict": lvspec_method(pair, AcceptancePolicy.strict(), config),
        "fly": lvspec_method(pair, AcceptancePolicy.fly(), config),
        "lvspec": lvspec_method(pair, AcceptancePolicy.lvspec(), config),
    }
    results = run_methods(methods, clips)
    rows = [result.summary(clips, results["autoregression"]) for result in results.values()]
    strict, theirs = (results[name].outputs for name in ("strict", "hf generate"))
    equal = sum(mine.text == other.text for mine, other in zip(strict, theirs, strict=True))
    table = Table("method", "tokens/s", "speedup", "tau", "attributes", "captions")
    for row in rows:
        figures = [f"{row['tokens_per_s']:.0f}", f"{row['speedup']:.2f}x", f"{row['tau']:.2f}"]
        table.add_row(row["method"], *figures, f"{row['attributes']:.1%}", f"{row['captions']:.1%}")
    console = Console()
    console.print(table)
    console.print(f"strict says what hf generate says on {equal} of {len(clips)} clips")
    if arguments.json:
        facts = {"clips": len(clips), "gamma": config.gamma, "strict_equals_hf": equal}
        facts |= {"dtype": arguments.dtype, "backend": ops.active_backend(device.type)}
        write_json(arguments.json, {"rows": rows, **facts, "environment": environment(device)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
