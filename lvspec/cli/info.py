"""`lvspec info`: what is installed, who computes, and why something is missing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "info", help="versions, backends and devices", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    for section, entries in facts.items():
        print(section)
        for name, value in entries.items():
            if isinstance(value, dict):
                value = ", ".join(
                    entry if isinstance(entry, str) else f"{entry} {kind}"
                    for kind, entry in value.items()
                )
            print(f"  {name:<20} {value}")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Everything that the command prints, by section."""
    import torch

    from lvspec import ops
    from lvspec.environment import environment
    from lvspec.ops import cpp_backend

    on_cuda = torch.cuda.is_available()
    versions = environment("cuda" if on_cuda else "cpu")
    backends = {
        name: f"{'yes' if backend else 'no '}  {backend.reason}"
        for name, backend in ops.backends().items()
    }
    used = {"cpu": ops.active_backend("cpu"), "cuda": computes_cuda(on_cuda)}
    if used["cpu"] == "cpp":
        used["cpu"] += f" ({cpp_backend.instruction_set()})"
    devices = {"cpu": f"{versions['cpu']}, {versions['threads']} threads"}
    if on_cuda:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            devices[f"cuda:{index}"] = (
                f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
            )
    else:
        built = torch.version.cuda
        devices["cuda"] = (
            f"no device (torch is built {f'for CUDA {built}' if built else 'for CPU'})"
        )
    optional = {
        name: "yes" if importlib.util.find_spec(name) else "no"
        for name in ("flash_attn", "flashinfer", "torchvision")
    }
    names = ("lvspec", "commit", "python", "torch", "transformers", "triton", "platform")
    return {
        "versions": {**{name: versions[name] for name in names}, "executable": sys.executable},
        "backends": backends,
        "computes": used,
        "passes": _passes(),
        "devices": devices,
        "optional packages": optional,
    }


def computes_cuda(there_is_one: bool) -> str:
    """Who computes on CUDA devices, or why nobody can; a call there would raise for that reason."""
    from lvspec import ops

    if not there_is_one:
        return "nothing: no CUDA device"
    name = ops.active_backend("cuda")
    backend = ops.backends()[name]
    return name if backend else f"nothing: {backend.reason}"


def _passes() -> dict[str, Any]:
    """Of both models of the embedded pair: whose they are, and see `DecodeStats.parts`."""
    from transformers.utils import logging as transformers_logging

    from lvspec.models.model import Model
    from lvspec.shapes.pair import load_embedded_pair

    transformers_logging.disable_progress_bar()
    try:
        pair = load_embedded_pair()
    except (OSError, ValueError) as error:  # what is wrong with an installation is asked here
        return {"embedded pair": f"cannot be loaded: {error}"}
    found = {}
    for role, hf in (("embedded target", pair.target), ("embedded draft", pair.draft)):
        model = Model(hf, role)
        found[role] = {"passes": model.made.passes, **model.made.parts}
    return found
