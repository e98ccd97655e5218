"""What an iteration costs at best, on paper: bytes over bandwidth, and launches.

    python bench/limits.py [--target qwen2.5-vl-7b] [--draft qwen2.5-vl-3b] [--gpu h200]
        [--context 16384] [--batch 1] [--gamma 12] [--tau 10] [--gpus 1] [--json FILE]
    python bench/limits.py --measured bench/results/cuda-e2e.json
    python bench/limits.py --predict [--pair qwen-32b-3b ...] [--json FILE]
    python bench/limits.py --captions [--fleet 1 8 256] [--new-tokens 256] [--decode-workers 8]
        [--draft-keep 1.0] [--gpus N] [--json FILE]

Without options a table of the pairs that matter. Nothing here is measured: bandwidths are the
makers' figures, and what a launch, a reduction and the overlap of work really cost is for a
profile to say. With `--measured` rows of `e2e.py` stand beside what this model says of them at the
bandwidth of their run. An iteration moves `gamma * draft + target` bytes, autoregression `target`
bytes a token, so with the same kernels the speed-up is `tau * target / (gamma * draft + target)`.

With `--predict` the kernels of every pair's iteration are counted (`launches.py`), and each is
taken to cost some microseconds beside its bytes: what is expected before anything is measured
(`paper/predictions.py`).

With `--captions` it is a million captions, from the file to the last token (`paper/captions.py`).

With `--gpus n` weights and caches are divided among n GPUs (tensor parallel): every pass then reads
1/n of the bytes and reduces its activations twice a layer.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measuring import script
from measuring.text_tables import describe
from ops.cases import (
    CONTEXTS,
    LLAVA_05B,
    LLAVA_7B,
    LLAVA_72B,
    QWEN_3B,
    QWEN_7B,
    QWEN_32B,
    QWEN_72B,
    Shape,
)
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
MODELS = {m.name: m for m in (QWEN_3B, QWEN_7B, QWEN_32B, QWEN_72B, LLAVA_05B, LLAVA_7B, LLAVA_72B)}
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
        draft_keep: Share of the context that the draft's cache keeps.
        draft_gpus: GPUs that share a pass of the draft; None: as many as of the target.
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
    draft_keep: float = 1.0
    draft_gpus: int | None = None

    @property
    def of_draft(self) -> Setting:
        """As the draft sees it."""
        context = round(self.draft_keep * self.context)
        return replace(self, context=context, gpus=self.draft_gpus or self.gpus)


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
    draft_moved, step, step_gaps = pass_seconds(setting.draft, setting.of_draft, 1, draft_weight)
    gaps = verify_gaps + setting.gamma * step_gaps + LAUNCHES_PER_ITERATION * setting.gap
    iteration = verify + setting.gamma * step + gaps
    alone = single + single_gaps
    held = 0.0
    for shape, whose, size in (
        (setting.target, setting, target_weight),
        (setting.draft, setting.of_draft, draft_weight),
    ):
        rows = setting.batch * (whose.context + slots)
        cache = rows * kv_bytes(shape, setting.kv_item)
        held += (parameters(shape)[1] * size + cache) / whose.gpus
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
        fits=held < 0.92 * setting.gpu.memory,
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


def on_paper(arguments: argparse.Namespace) -> dict[str, Any]:
    """The document of `--predict` or `--captions`."""
    gpu = GPUS[arguments.gpu]
    if arguments.predict:
        from paper.predictions import PREDICTED, predictions

        pairs, contexts = arguments.pair or PREDICTED, arguments.context or CONTEXTS
        return predictions(pairs, contexts, arguments.gamma, gpu)
    from paper.captions import Clip, Fleet, captions

    prompt = Clip.prompt if arguments.context is None else arguments.context[0]
    clip = Clip(prompt, arguments.new_tokens, workers=arguments.decode_workers)
    fields = {"gamma": arguments.gamma, "tau": arguments.tau, "draft_keep": arguments.draft_keep}
    fleets = [Fleet(count, gpu, arguments.gpus) for count in arguments.fleet]
    return captions(clip, fleets, **fields)


def main() -> int:
    parser = script.parser_of(__doc__)
    parser.add_argument("--measured", type=Path, help="JSON of e2e.py to compare with")
    parser.add_argument("--predict", action="store_true", help="limits and kernels of pairs")
    parser.add_argument("--pair", nargs="+", help="of bench/pairs/pairs.py")
    parser.add_argument("--captions", action="store_true", help="a million of them")
    parser.add_argument("--fleet", type=int, nargs="+", default=[1, 8, 256], help="GPUs in all")
    parser.add_argument("--new-tokens", type=int, default=256, help="of a caption")
    parser.add_argument("--decode-workers", type=int, default=8, help="CPU cores a GPU")
    parser.add_argument("--draft-keep", type=float, default=1.0)
    parser.add_argument("--fuse", choices=LAUNCHES_PER_LAYER, default="kernels")
    parser.add_argument("--target", choices=MODELS)
    parser.add_argument("--draft", choices=MODELS)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--context", type=int, nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--tau", type=float, default=10.0)
    parser.add_argument("--gpus", type=int, help="that share a pass (tensor parallel)")
    parser.add_argument("--weight-bytes", type=float, nargs=2, default=(2.0, 2.0))
    arguments = script.begin(parser)
    if arguments.measured:
        print_comparison(json.loads(arguments.measured.read_text()))
        return 0
    if arguments.predict or arguments.captions:
        document = on_paper(arguments)
        print("\n".join(describe(document)))
        script.finish(arguments, document)
        return 0
    if (arguments.target is None) != (arguments.draft is None):
        parser.error("--target and --draft: expected both or neither")
    chosen = (arguments.target, arguments.draft)
    pairs = PAIRS if arguments.target is None else (tuple(MODELS[name] for name in chosen),)
    rows, lines, gpus = [], [], arguments.gpus or 1
    for target, draft in pairs:
        for context in arguments.context or CONTEXTS:
            setting = Setting(
                target,
                draft,
                GPUS[arguments.gpu],
                context=context,
                batch=arguments.batch,
                gamma=arguments.gamma,
                tau=arguments.tau,
                gpus=gpus,
                draft_keep=arguments.draft_keep,
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
        title=f"limits on paper: {gpus} x {arguments.gpu}, batch {arguments.batch}, "
        f"gamma {arguments.gamma}, tau {arguments.tau:g}",
    )
    script.finish(arguments, {"rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
