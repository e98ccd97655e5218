"""What an iteration costs at best, on paper: bytes over bandwidth, and launches.

    python bench/limits.py [--target qwen2.5-vl-7b] [--draft qwen2.5-vl-3b] [--gpu h200]
        [--context 16384] [--batch 1] [--gamma 12] [--tau 10] [--gpus 1] [--json FILE]
    python bench/limits.py --measured bench/results/cuda-e2e.json

Without options a table of the pairs that matter. Nothing here is measured: bandwidths are the
makers' figures, and what a launch, a reduction and the overlap of work really cost is for a
profile to say. With `--measured` rows of `e2e.py` stand beside what this model says of them at the
bandwidth of their run. An iteration moves `gamma * draft + target` bytes, autoregression `target`
bytes a token, so with the same kernels the speed-up is `tau * target / (gamma * draft + target)`.

With `--gpus n` weights and caches are divided among n GPUs (tensor parallel): every pass then reads
1/n of the bytes and reduces its activations twice a layer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measuring import script
from ops.cases import LLAVA_05B, LLAVA_7B, LLAVA_72B, QWEN_3B, QWEN_7B, QWEN_32B, Shape
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Gpu:
    """A GPU by its maker's figures.

    Attributes:
        bandwidth: Bytes per second of its memory.
        memory: Bytes.
        flops: Dense bfloat16 operations per second.
    """

    name: str
    bandwidth: float
    memory: float
    flops: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 2.04e12, 80e9, 312e12),
        Gpu("h100", 3.35e12, 80e9, 989e12),
        Gpu("h200", 4.80e12, 141e9, 989e12),
        Gpu("b200", 8.00e12, 180e9, 2250e12),
    )
}
MODELS = {m.name: m for m in (QWEN_3B, QWEN_7B, QWEN_32B, LLAVA_05B, LLAVA_7B, LLAVA_72B)}
PAIRS = (
    (QWEN_7B, QWEN_3B),
    (QWEN_32B, QWEN_3B),
    (QWEN_32B, QWEN_7B),
    (LLAVA_7B, LLAVA_05B),
    (LLAVA_72B, LLAVA_7B),
)
LAUNCHES_PER_LAYER = {"none": 41, "kernels": 7}
"""Kernels of one decoder layer in a pass of one slot, by `DecodeConfig.fuse`, as `launches.py`
counts them."""
LAUNCHES_PER_PASS = {"none": 28, "kernels": 6}
"""Those beside the layers."""
ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
LAUNCHES_PER_ITERATION = 40
"""Statistics, acceptance, commit and what makes slots."""


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        context: Committed tokens of every sequence.
        tau: Tokens per pass of the target, the bonus token included.
        weight_bytes: Bytes of one weight of (target, draft); 2 is bfloat16, 1 fp8 or int8.
        gpus: GPUs that share every pass.
        gap: Seconds between two kernels of a graph in which nothing is computed.
        reduction: Seconds of one all-reduce among the GPUs.
        fuse: `DecodeConfig.fuse`, a key of `LAUNCHES_PER_LAYER`.
        kv_item: Bytes of a key or value; 2 is bfloat16.
    """

    target: Shape
    draft: Shape
    gpu: Gpu
    context: int = 16384
    batch: int = 1
    gamma: int = 12
    tau: float = 10.0
    weight_bytes: tuple[float, float] = (2.0, 2.0)
    gpus: int = 1
    gap: float = 1e-6
    reduction: float = 1e-5
    fuse: str = "kernels"
    kv_item: int = 2


@dataclass(frozen=True)
class Limit:
    """Seconds and bytes of one iteration at best; `speedup` is over autoregression at best."""

    target_bytes: float
    draft_bytes: float
    target_ms: float
    draft_step_ms: float
    iteration_ms: float
    gaps_ms: float
    autoregression_ms: float
    speedup: float
    tokens_per_second: float
    fits: bool


def parameters(shape: Shape) -> tuple[int, int]:
    """(weights that a pass reads, weights that are held), of the text model."""
    hidden = shape.hidden_size
    kv = shape.num_kv_heads * shape.head_dim
    attention = 2 * hidden * hidden + 2 * hidden * kv + hidden + 2 * kv
    layer = attention + 3 * hidden * shape.intermediate_size + 2 * hidden
    embedding = shape.vocabulary * hidden
    read = shape.num_layers * layer + embedding + hidden
    return read, read + (0 if shape.tied else embedding)


def kv_bytes(shape: Shape, itemsize: int = 2) -> int:
    """Bytes of keys and values of one token."""
    return 2 * itemsize * shape.num_layers * shape.num_kv_heads * shape.head_dim


def pass_seconds(
    shape: Shape, setting: Setting, rows: int, weight_bytes: float
) -> tuple[float, float, float]:
    """(bytes, seconds, seconds of gaps) of one pass of `rows` slots a sequence, on each GPU."""
    read, _ = parameters(shape)
    moved = read * weight_bytes + setting.batch * setting.context * kv_bytes(shape, setting.kv_item)
    moved /= setting.gpus
    work = 2 * read * rows * setting.batch / setting.gpus
    busy = max(moved / setting.gpu.bandwidth, work / setting.gpu.flops)
    if setting.gpus > 1:
        busy += 2 * shape.num_layers * setting.reduction
    launches = LAUNCHES_PER_LAYER[setting.fuse] * shape.num_layers + LAUNCHES_PER_PASS[setting.fuse]
    return moved, busy, launches * setting.gap


def limit(setting: Setting) -> Limit:
    """The best that an iteration of this setting can do."""
    target_weight, draft_weight = setting.weight_bytes
    slots = setting.gamma + 1
    moved, verify, verify_gaps = pass_seconds(setting.target, setting, slots, target_weight)
    _, single, single_gaps = pass_seconds(setting.target, setting, 1, target_weight)
    draft_moved, step, step_gaps = pass_seconds(setting.draft, setting, 1, draft_weight)
    gaps = verify_gaps + setting.gamma * step_gaps + LAUNCHES_PER_ITERATION * setting.gap
    iteration = verify + setting.gamma * step + gaps
    alone = single + single_gaps
    tokens = setting.context + setting.gamma + 1
    held = sum(
        parameters(shape)[1] * size + setting.batch * tokens * kv_bytes(shape, setting.kv_item)
        for shape, size in zip((setting.target, setting.draft), setting.weight_bytes, strict=True)
    )
    return Limit(
        target_bytes=moved,
        draft_bytes=draft_moved,
        target_ms=1e3 * verify,
        draft_step_ms=1e3 * step,
        iteration_ms=1e3 * iteration,
        gaps_ms=1e3 * gaps,
        autoregression_ms=1e3 * alone,
        speedup=setting.tau * alone / iteration,
        tokens_per_second=setting.batch * setting.tau / iteration,
        fits=held / setting.gpus < 0.92 * setting.gpu.memory,
    )


def best_gamma(setting: Setting, acceptance: float) -> tuple[int, float]:
    """(gamma, speed-up) that is best if every draft token is accepted with this probability."""
    found = []
    for gamma in range(1, 64):
        tau = sum(acceptance**i for i in range(gamma + 1))
        found.append((limit(replace(setting, gamma=gamma, tau=tau)).speedup, gamma))
    speedup, gamma = max(found)
    return gamma, speedup


@dataclass(frozen=True)
class Comparison:
    """A measured row beside what is predicted of it, milliseconds."""

    row: str
    what: str
    predicted_ms: float
    measured_ms: float

    @property
    def ratio(self) -> float:
        return self.measured_ms / self.predicted_ms


def compare(document: dict[str, Any]) -> list[Comparison]:
    """Every iteration and every token of autoregression of a document of `e2e.py`."""
    gpu = Gpu("measured", 1e9 * document["limits"]["copy_gb_per_s"], 1e18, GPUS["h200"].flops)
    found = []
    for row in document["pairs"]:
        if "not_measured" in row:
            continue
        shapes = [Shape(**row[role]["shape"]) for role in ("target", "draft")]
        # A draft may hold its weights in fewer bytes, or read a part of its head.
        pass_bytes = [1e9 * row[role]["pass_gb"] for role in ("target", "draft")]
        item = ITEM_SIZES[row["dtype"]]
        setting = Setting(
            *shapes,
            gpu,
            context=row["context"],
            batch=row["batch"],
            gamma=row["gamma"],
            tau=row["tau"],
            weight_bytes=tuple(b / parameters(s)[0] for b, s in zip(pass_bytes, shapes)),
            fuse=row["fuse"],
            kv_item=item,
        )
        best = limit(setting)
        name = f"{row['label']}, {row['context']}, batch {row['batch']}"
        predicted = {"lvspec": best.iteration_ms, "autoregression": best.autoregression_ms}
        for what, milliseconds in predicted.items():
            measured = row["methods"][what].get("wall_ms")
            if measured is not None:
                found.append(Comparison(name, what, milliseconds, measured))
    return found


def print_comparison(document: dict[str, Any]) -> None:
    bandwidth, name = document["limits"]["copy_gb_per_s"], document["environment"]["device_name"]
    table = Table(title=f"{name}, {bandwidth:.0f} GB/s")
    for heading in ("row", "what", "predicted ms", "measured ms", "ratio"):
        table.add_column(heading, justify="left" if heading in ("row", "what") else "right")
    for found in compare(document):
        figures = (f"{found.predicted_ms:.3f}", f"{found.measured_ms:.3f}", f"{found.ratio:.2f}")
        table.add_row(found.row, found.what, *figures)
    Console().print(table)


def main() -> int:
    parser = script.parser_of(__doc__)
    parser.add_argument("--measured", type=Path, help="JSON of e2e.py to compare with")
    parser.add_argument("--fuse", choices=LAUNCHES_PER_LAYER, default="kernels")
    parser.add_argument("--target", choices=MODELS)
    parser.add_argument("--draft", choices=MODELS)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--tau", type=float, default=10.0)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--weight-bytes", type=float, nargs=2, default=(2.0, 2.0))
    arguments = script.begin(parser)
    if arguments.measured:
        print_comparison(json.loads(arguments.measured.read_text()))
        return 0
    if (arguments.target is None) != (arguments.draft is None):
        parser.error("--target and --draft: expected both or neither")
    chosen = (arguments.target, arguments.draft)
    pairs = PAIRS if arguments.target is None else (tuple(MODELS[name] for name in chosen),)
    rows, lines = [], []
    for target, draft in pairs:
        for context in arguments.context:
            setting = Setting(
                target,
                draft,
                GPUS[arguments.gpu],
                context=context,
                batch=arguments.batch,
                gamma=arguments.gamma,
                tau=arguments.tau,
                gpus=arguments.gpus,
                weight_bytes=tuple(arguments.weight_bytes),
                fuse=arguments.fuse,
            )
            found = limit(setting)
            gamma, speedup = best_gamma(setting, 0.9)
            rows.append({"setting": asdict(setting), **asdict(found), "best_gamma": gamma})
            lines.append(
                (
                    f"{target.name} <- {draft.name}",
                    str(context),
                    f"{found.autoregression_ms:.2f}",
                    f"{found.draft_step_ms:.2f}",
                    f"{found.target_ms:.2f}",
                    f"{found.iteration_ms:.2f}",
                    f"{found.speedup:.2f}x",
                    f"{found.tokens_per_second:.0f}",
                    f"{gamma} ({speedup:.2f}x)",
                    "yes" if found.fits else "no",
                )
            )
    script.print_table(
        (
            *("target <- draft", "context", "ms/token alone", "draft step", "verify", "iteration"),
            *("speed-up", "tokens/s", "best gamma at 0.9", "fits"),
        ),
        lines,
        title=f"limits on paper: {arguments.gpus} x {arguments.gpu}, batch {arguments.batch}, "
        f"gamma {arguments.gamma}, tau {arguments.tau:g}",
    )
    script.finish(arguments, {"rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
