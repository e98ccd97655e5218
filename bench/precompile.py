"""A Triton cache for a GPU that is elsewhere: what iterations launch, compiled here.

    python bench/precompile.py qwen-32b-3b qwen-7b-3b [--context 16384] [--gamma 12] [--batch 1]
        [--arch sm90 sm100] [--cache triton-cache] [--json FILE]
    python bench/precompile.py --use [--cache triton-cache]       exit code 1: it does not fit here

Iterations of pairs of real shapes run on tensors without data: with a chain, with SpecVLM's tree
and without a draft, as `e2e.py` measures them, and with the early launches of `profile_step.py`.
Their launches go through Triton's own compiler with a driver that has no device, launchers in C
included. Any checkout of these sources uses it with TRITON_CACHE_DIR, with the same triton, ptxas
and Python. Triton keeps the paths of its files in it: wherever a copy is, `--use` comes first, or
all is compiled again. (From triton 3.7 on its one module in C depends on where triton and libcuda
are: where they are elsewhere that is built anew there, with a C compiler, in about a second.)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: nothing is run here
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as gpu.sh sets it: part of every key

import triton
from measuring import script
from ops.early import launch_early
from ops.no_driver import Compiled, compile_launch, compiling_for
from pairs.pairs import PAIRS, Pair
from pairs.without_data import run_iteration
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.nvidia.compiler import get_ptxas_version

CAPABILITY = {"sm80": 80, "sm90": 90, "sm100": 100}
FILE = "lvspec.json"
"""In the cache's folder: what it was made with."""


def made_with() -> dict[str, Any]:
    """All that decides whether Triton here finds what was compiled there, besides the sources."""
    library = Path(triton.__file__).parent / "_C"
    (file,) = library.glob("libtriton*.so")
    return {
        "libtriton": hashlib.sha256(file.read_bytes()).hexdigest(),
        "triton": triton.__version__,
        "ptxas": get_ptxas_version(),
        "python": sysconfig.get_config_var("EXT_SUFFIX"),
        "machine": platform.machine(),
        "environment": dict(sorted(get_cache_invalidating_env_vars().items())),
    }


def misfits(cache: Path) -> list[str]:
    """Why a cache would not be used here, one reason a line."""
    try:
        there = json.loads((cache / FILE).read_text())
    except (OSError, ValueError) as error:
        return [f"{cache}: expected the folder of a cache, got {type(error).__name__}: {error}"]
    return [
        f"{name}: expected {value}, got {there.get(name)}"
        for name, value in made_with().items()
        if there.get(name) != value
    ]


def settle(cache: Path) -> None:
    """Have Triton find what a cache has: which files belong together it keeps by their paths."""
    for group in cache.glob("*/__grp__*.json"):
        found = json.loads(group.read_text())
        names = found["child_paths"]
        found["child_paths"] = {name: str(group.parent.resolve() / name) for name in names}
        group.write_text(json.dumps(found))


def compile_pair(pair: Pair, device_class: str, **options: Any) -> None:
    """What iterations of a pair launch, within `compiling_for`."""
    launches = {"launched": compile_launch, "before": compile_launch}
    common = {**launches, "device_class": device_class, **options}
    run_iteration(pair, **common)
    run_iteration(pair, **common, tree="specvlm")
    run_iteration(pair, **common, drafts=False)
    if device_class == "sm80":  # which has none
        return
    launch_early(True)
    try:
        run_iteration(pair, **common)
    finally:
        launch_early(False)


def describe(found: Compiled, seconds: float) -> str:
    return (
        f"{len(found.kernels)} kernels, {len(found.compiled)} compiled, and {len(found.built)} "
        f"modules in C built, in {seconds:.0f} s"
    )


def main() -> int:
    parser = script.parser_of(__doc__)
    parser.add_argument("pairs", nargs="*", metavar="PAIR", help=", ".join(PAIRS))
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--arch", nargs="+", choices=CAPABILITY, default=["sm90"])
    parser.add_argument("--cache", type=Path, default=Path("triton-cache"), metavar="FOLDER")
    parser.add_argument("--use", action="store_true", help="have Triton find it here, if it fits")
    arguments = script.begin(parser)
    if arguments.use:
        reasons = misfits(arguments.cache)
        if not reasons:
            settle(arguments.cache)
        print("\n".join(reasons) or f"{arguments.cache}: fits")
        return int(bool(reasons))
    for name in arguments.pairs:
        if name not in PAIRS:
            parser.error(f"PAIR: expected one of {', '.join(PAIRS)}, got {name}")
    if not arguments.pairs:
        parser.error("PAIR: expected at least one name")
    cache = arguments.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    settle(cache)
    rows = []
    for device_class in arguments.arch:
        for name in arguments.pairs:
            start = time.perf_counter()
            with compiling_for(CAPABILITY[device_class], cache) as found:
                compile_pair(
                    PAIRS[name],
                    device_class,
                    context=arguments.context,
                    gamma=arguments.gamma,
                    batch_size=arguments.batch,
                )
            seconds = time.perf_counter() - start
            print(f"{name}, {device_class}: {describe(found, seconds)}", flush=True)
            row = {"pair": name, "arch": device_class, "kernels": len(found.kernels)}
            row |= {"compiled": found.compiled, "built": found.built, "seconds": seconds}
            rows.append(row)
    (cache / FILE).write_text(json.dumps(made_with(), indent=2) + "\n")
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    print(f"{arguments.cache}: {size / 1e6:.1f} MB")
    script.finish(arguments, {"rows": rows, "bytes": size, "made_with": made_with()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
