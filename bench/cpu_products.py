"""All products of a pass of the embedded pair, for few rows and many: packed weights and torch's.

    python bench/cpu_products.py [--json FILE]

One CPU thread; `LVSPEC_CPU=avx2` or `portable` for a narrower instruction set, which torch does not
keep to. Milliseconds that the thread was computing, lower quartiles of rounds in which everyone has
a turn. `limit` is the larger of two: the products at the rate at which torch multiplies large
matrices in the same rounds, and the packed bytes at the rate at which torch adds up as many.
Results are checked before they are timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from measuring import script
from torch import Tensor
from torch.nn import functional

from lvspec import ops
from lvspec.ops.cpp_backend import instruction_set
from lvspec.shapes.model_configs import draft_config, target_config

ROWS = (1, 4, 6, 13, 25, 41, 64, 128)
LARGE = 512  # rows and columns of the matrices that show what torch can do


class Product(NamedTuple):
    """`weight` [O, I], or gates and behind them ups [2 * O, I]; `packed` is the same."""

    weight: Tensor
    packed: Tensor
    outputs: int
    gated: bool

    def ours(self, x: Tensor) -> Tensor:
        if self.gated:
            return torch.ops.lvspec.cpu_packed_gated_linear(x, self.packed, self.outputs)
        return torch.ops.lvspec.cpu_packed_linear(x, self.packed, self.outputs, None, None)

    def theirs(self, x: Tensor) -> Tensor:
        product = functional.linear(x, self.weight)
        if not self.gated:
            return product
        gates, ups = product.chunk(2, -1)
        return functional.silu(gates) * ups


def products(config: object) -> list[Product]:
    """Of a pass, in order: weights that float16 has, as those of the embedded pair."""
    text = config.text_config
    size, heads = text.hidden_size, text.num_attention_heads
    attended = heads * (size // heads)
    keys = text.num_key_value_heads * (size // heads)
    layer = [
        (attended + 2 * keys, size, False),
        (size, attended, False),
        (text.intermediate_size, size, True),
        (size, text.intermediate_size, False),
    ]
    found = []
    for outputs, inputs, gated in [*layer * text.num_hidden_layers, (text.vocab_size, size, False)]:
        weight = (torch.randn((1 + gated) * outputs, inputs) / inputs**0.5).half().float()
        found.append(Product(weight, torch.ops.lvspec.cpu_pack(weight, gated), outputs, gated))
    return found


def check(product: Product, x: Tensor) -> None:
    """Exits where ours is further from float64 than sums of float32 can be."""
    exact = product._replace(weight=product.weight.double()).theirs(x.double())
    error = (product.ours(x) - exact).abs().max().item()
    if not error <= 1e-5 * exact.abs().max().item():
        raise SystemExit(f"packed product of {tuple(product.weight.shape)}: error {error:.1e}")


def quartiles(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.quantiles(of, n=4)[0] for name, of in times.items()}


def measure(every: list[Product], rows: int) -> dict[str, float]:
    """Milliseconds of a pass with `rows` rows, and its limit."""
    inputs = {one.weight.shape[1]: torch.randn(rows, one.weight.shape[1]) for one in every}
    with_x = [(one, inputs[one.weight.shape[1]]) for one in every]
    for one, x in with_x:
        check(one, x)
    large = torch.randn(LARGE, LARGE)
    read = torch.ones(sum(one.packed.nbytes for one in every) // 4)
    calls = {
        "packed": lambda: [one.ours(x) for one, x in with_x],
        "torch": lambda: [one.theirs(x) for one, x in with_x],
        "large": lambda: large @ large,
        "read": read.sum,
    }
    milliseconds = quartiles(calls, 40 if rows < 40 else 15)
    share = rows * sum(one.weight.numel() for one in every) / LARGE**3
    return {"limit": max(share * milliseconds["large"], milliseconds["read"]), **milliseconds}


@torch.inference_mode()
def main() -> None:
    options = script.begin(script.parser_of(__doc__))
    torch.set_num_threads(1)
    if ops.active_backend("cpu") != "cpp":
        raise SystemExit(f"expected the cpp backend: {ops.backends()['cpp'].reason}")
    results = []
    for name, config in (("target", target_config()), ("draft", draft_config())):
        every = products(config)
        results += [{"pass": name, "rows": rows, **measure(every, rows)} for rows in ROWS]
    script.print_table(
        ("pass", "rows", "packed ms", "torch ms", "times", "limit ms", "share of it"),
        (
            (
                row["pass"],
                str(row["rows"]),
                f"{row['packed']:.2f}",
                f"{row['torch']:.2f}",
                f"{row['torch'] / row['packed']:.2f}",
                f"{row['limit']:.2f}",
                f"{row['limit'] / row['packed']:.0%}",
            )
            for row in results
        ),
        title=f"{instruction_set()}, packed in {str(every[0].packed.dtype)[6:]}",
    )
    script.finish(options, {"instruction_set": instruction_set(), "rows": results})


if __name__ == "__main__":
    main()
