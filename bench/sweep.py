"""Launch tables from measurement: every tile, warp and stage count that compiles well, timed.

    python bench/sweep.py [--head-dim 128] [--dtype bfloat16] [--context 16384] [--json FILE]

For verify_attention, whose `LAUNCH` table is the only one that depends on more than a block size.
Without a GPU, or with --static, candidates are only compiled for --device-class, and those are
printed that neither spill nor need more shared memory than there is. With one they are timed too
(CUDA events, cold L2), and the line that `launch_table.py` of the kernel should have is printed:
BLOCK_N is one number for all tiles, since the bits of a row must not depend on how many there are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import budget
import torch
from measuring import script
from ops import budget_calls
from ops.compiling import Compilation

from lvspec import ops, tree
from lvspec.kernels import launch, verify_attention

BLOCK_N = (32, 64, 128)
TILES = (16, 32, 64, 128)
WARPS = (4, 8)
STAGES = (2, 3, 4)


def candidates(
    device_class: str, dtype: torch.dtype, head_dim: int, fp8: bool
) -> list[dict[str, int]]:
    """Tiles that compile without spilling and fit, with what the compiler says of them."""
    kept = []
    key = (device_class, max(64, head_dim), 1 if fp8 else dtype.itemsize)
    table = dict(verify_attention.LAUNCH)
    for block_n in BLOCK_N:
        for tile in TILES:
            for warps in WARPS:
                for stages in STAGES:
                    verify_attention.LAUNCH[key] = (block_n, {tile: (warps, stages)})
                    shape = {"BLOCK_N": block_n, "BLOCK_M": tile}
                    figures = _compiled(device_class, dtype, head_dim, tile, fp8)
                    if figures is not None:
                        kept.append({**shape, **figures})
    verify_attention.LAUNCH.update(table)
    return kept


def _compiled(
    device_class: str, dtype: torch.dtype, head_dim: int, tile: int, fp8: bool
) -> dict[str, int] | None:
    make = budget_calls.attention(dtype, head_dim, tile, fp8=fp8)
    arguments, capability = make(device_class)
    attend, _ = budget.launches_of("verify_attention", arguments, device_class)
    try:
        figures = Compilation(attend, capability).figures()
    except Exception as error:  # whatever the compiler dislikes about this tile
        print(f"# {tile=}: {type(error).__name__}", file=sys.stderr)
        return None
    chip = budget.CHIPS[device_class]
    if figures["spilled"] or figures["shared"] > chip.shared:
        return None
    return {**figures, "occupancy": budget.occupancy(figures, chip)}


def timed(
    kept: list[dict[str, int]], dtype: torch.dtype, head_dim: int, context: int, fp8: bool
) -> None:
    """Add the median time of every candidate on the GPU, with as many rows as its tile has."""
    from measuring import timing

    device = torch.device("cuda")
    key = (launch.device_class(device), max(64, head_dim), 1 if fp8 else dtype.itemsize)
    table = dict(verify_attention.LAUNCH)
    for candidate in kept:
        options = (candidate["num_warps"], candidate["num_stages"])
        verify_attention.LAUNCH[key] = (candidate["BLOCK_N"], {candidate["BLOCK_M"]: options})
        call = _call(device, dtype, head_dim, candidate["BLOCK_M"], context, fp8)
        candidate["microseconds"] = 1000 * timing.measure(call, device).median_ms
    verify_attention.LAUNCH.update(table)


def _call(
    device: torch.device, dtype: torch.dtype, head_dim: int, rows: int, context: int, fp8: bool
) -> Callable[[], Any]:
    """verify_attention of a prompt that is one video, 8 KV heads, `rows` rows for each of them."""
    slots = min(rows, 64)
    group, kv_heads, capacity = rows // slots, 8, context + 512
    q = torch.randn(1, group * kv_heads, slots, head_dim, device=device).to(dtype)
    k_cache, v_cache = torch.randn(2, 1, kv_heads, capacity, head_dim, device=device).to(
        torch.float8_e4m3fn if fp8 else dtype
    )
    kv_len = torch.full((1,), context, dtype=torch.int32, device=device)
    visual = (torch.arange(capacity, device=device) < context)[None].byte()
    factors = torch.ones(kv_heads, device=device) if fp8 else None
    plan = ops.plan_splits(visual.cpu(), torch.tensor([context]), num_kv_heads=kv_heads)
    size = ops.workspace_size(
        batch_size=1,
        num_slots=slots,
        num_q_heads=group * kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        vocabulary=1,
        num_pieces=plan.start.shape[1],
    )
    return functools.partial(
        verify_attention.verify_attention,
        q,
        k_cache,
        v_cache,
        kv_len,
        tree.chain_ancestors(slots, batch_size=1, device=device),
        visual,
        head_dim**-0.5,
        None,
        *(table.to(device) for table in plan),
        factors,
        factors,
        True,
        torch.empty(size, dtype=torch.uint8, device=device),
    )


def best_line(kept: list[dict[str, int]], key: tuple[str, int, int]) -> str:
    """The entry for `LAUNCH`: the BLOCK_N whose tiles are quickest in sum, each at its best."""
    by_block: dict[int, dict[int, dict[str, Any]]] = {}
    for candidate in kept:
        tiles = by_block.setdefault(candidate["BLOCK_N"], {})
        best = tiles.get(candidate["BLOCK_M"])
        if best is None or candidate["microseconds"] < best["microseconds"]:
            tiles[candidate["BLOCK_M"]] = candidate
    most = max(map(len, by_block.values()))
    complete = {n: tiles for n, tiles in by_block.items() if len(tiles) == most}
    block_n = min(complete, key=lambda n: sum(c["microseconds"] for c in complete[n].values()))
    tiles = {m: (c["num_warps"], c["num_stages"]) for m, c in sorted(complete[block_n].items())}
    return f"    {key}: ({block_n}, {tiles}),"


def main() -> int:
    parser = script.parser_of(__doc__)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--fp8", action="store_true", help="float8_e4m3fn keys and values")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--device-class", choices=launch.DEVICE_CLASSES)
    parser.add_argument("--static", action="store_true", help="compile only")
    options = script.begin(parser)
    measuring = torch.cuda.is_available() and not options.static
    device_class = options.device_class or launch.device_class(
        torch.device("cuda" if measuring else "cpu")
    )
    dtype = getattr(torch, options.dtype)
    kept = candidates(device_class, dtype, options.head_dim, options.fp8)
    if measuring:
        timed(kept, dtype, options.head_dim, options.context, options.fp8)
        kept.sort(key=lambda candidate: (candidate["BLOCK_M"], candidate["microseconds"]))
    for candidate in kept:
        print("  ".join(f"{name}={value}" for name, value in candidate.items()))
    if measuring:
        size = 1 if options.fp8 else dtype.itemsize
        print(best_line(kept, (device_class, max(64, options.head_dim), size)))
    device = "cuda" if measuring else "cpu"
    script.finish(options, {"device_class": device_class, "rows": kept}, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
