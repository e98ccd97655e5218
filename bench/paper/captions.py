"""A million captions on paper: what reads videos, prompts and answers, and which of it limits.

The document of `limits.py --captions`. Of every clip its frames are decoded on CPUs, beside the
devices; the towers of target and draft see them, both models read the prompt, and an answer is
decoded by as many clips together as is fastest and fits. Nothing of it is measured but what
decoding a clip takes on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from limits import Gpu, Setting, limit, parameters
from ops.cases import QWEN_3B, QWEN_7B, QWEN_32B, QWEN_72B, Shape

CLIPS = 10**6
PAIRS = ((QWEN_7B, QWEN_3B), (QWEN_32B, QWEN_7B), (QWEN_72B, QWEN_7B))
BATCHES = (1, 2, 4, 8, 16, 32)
TOWER_WEIGHTS, PATCHES = 0.63e9, 4
"""Of Qwen2.5-VL's vision tower: weights that a patch meets, and patches of a token. Its attention,
within windows nearly everywhere, is some per cent more and left out."""
REACHED = 0.6
"""Share of a GPU's operations per second that towers and prompts reach, an assumption."""
LINK = 4.5e11
"""Bytes per second and direction between two GPUs of a machine, by the maker."""
TENSOR_PARALLEL = (1, 2, 4, 8)


@dataclass(frozen=True)
class Clip:
    """What is captioned: 30 seconds of video.

    Attributes:
        prompt: Tokens, nearly all of them of the video.
        new_tokens: Of a caption.
        cpu_seconds: Of one core, to decode and resize its frames: of 720p and 30 seconds 1.7 s
            with two threads.
        workers: Cores that do that for every GPU.
    """

    prompt: int = 16384
    new_tokens: int = 256
    cpu_seconds: float = 3.4
    workers: int = 8


@dataclass(frozen=True)
class Fleet:
    """GPUs, in groups that share every pass of a target.

    Attributes:
        count: In all.
        gpus: Of a group; None: as few as a pair fits into. Where that is more than there are,
            the target's weights are fp8.
    """

    count: int
    gpu: Gpu
    gpus: int | None = None


@dataclass(frozen=True)
class Stages:
    """Seconds of one clip in a group of GPUs, by what they go to.

    Attributes:
        cpu: Its frames are decoded by the cores of the group, beside everything else.
        vision: Towers.
        prefill: Prompts.
        decoding: Of `batch` clips together, divided by these.
    """

    cpu: float
    vision: float
    prefill: float
    decoding: float
    batch: int

    @property
    def device(self) -> float:
        """All of the group's time for a clip."""
        return self.vision + self.prefill + self.decoding

    @property
    def seconds(self) -> float:
        """From one clip to the next where nothing waits for anything else."""
        return max(self.cpu, self.device)

    @property
    def limited_by(self) -> str:
        """What takes longest of that."""
        if self.cpu > self.device:
            return "video on CPUs"
        return max(("vision", "prefill", "decoding"), key=lambda name: getattr(self, name))


def prompt_operations(shape: Shape, tokens: int) -> float:
    """Of a prompt: products of all layers, and causal attention."""
    layers = parameters(shape)[0] - shape.vocabulary * shape.hidden_size
    return 2 * layers * tokens + 2 * shape.num_layers * shape.hidden_size * tokens**2


def prefill_seconds(shape: Shape, tokens: int, gpu: Gpu, gpus: int) -> float:
    """Of a prompt on a group, which sums the activations twice a layer."""
    busy = prompt_operations(shape, tokens) / (gpus * REACHED * gpu.flops)
    summed = 2 * shape.num_layers * 2 * tokens * shape.hidden_size
    return busy + 2 * (gpus - 1) / gpus * summed / LINK


def stages(
    setting: Setting, clip: Clip, *, drafts: bool = True, batches: Iterable[int] = BATCHES
) -> Stages:
    """Of a pair, or of its target alone, with the best of these batches; see `fitting`.

    A tower is not divided among a group, nor is the draft: a copy of it is on every GPU.
    """
    gpu, gpus = setting.gpu, setting.gpus
    decoding = {}
    for size in batches:
        best = limit(replace(setting, batch=size))
        if best.fits:
            alone = size / (1e-3 * best.autoregression_ms)
            decoding[size] = clip.new_tokens / (best.tokens_per_second if drafts else alone)
    batch = min(decoding, key=decoding.get)
    tower = 2 * TOWER_WEIGHTS * PATCHES * clip.prompt / (REACHED * gpu.flops)
    prefill = prefill_seconds(setting.target, clip.prompt, gpu, gpus)
    if drafts:
        prefill += prefill_seconds(setting.draft, clip.prompt, gpu, 1)
    return Stages(
        cpu=clip.cpu_seconds / (clip.workers * gpus),
        vision=(1 + drafts) * tower,
        prefill=prefill,
        decoding=decoding[batch],
        batch=batch,
    )


def captions(clip: Clip, fleets: Sequence[Fleet], **fields: Any) -> dict[str, Any]:
    """The document of `--captions`; `fields` are of `Setting`."""
    rows = []
    for target, draft in PAIRS:
        for fleet in fleets:
            setting = fitting(Setting(target, draft, fleet.gpu, **fields), clip, fleet)
            both, alone = (stages(setting, clip, drafts=drafts) for drafts in (True, False))
            one, one_alone = (
                stages(setting, clip, drafts=drafts, batches=(1,)) for drafts in (True, False)
            )
            hours = CLIPS / 3600 / (fleet.count // setting.gpus)
            rows.append(
                {
                    "target": target.name,
                    "draft": draft.name,
                    "fleet": fleet.count,
                    "gpus": setting.gpus,
                    "weight_bytes": setting.weight_bytes[0],
                    "hours": hours * both.seconds,
                    "alone_hours": hours * alone.seconds,
                    "limited_by": both.limited_by,
                    "stages": asdict(both),
                    "alone": asdict(alone),
                    "one_speedup": one_alone.device / one.device,
                    "one_decoding_speedup": one_alone.decoding / one.decoding,
                }
            )
    return {
        "kind": "captions",
        "gpu": fleets[0].gpu.name,
        "clip": asdict(clip),
        "setting": fields,
        "rows": rows,
    }


def fitting(setting: Setting, clip: Clip, fleet: Fleet) -> Setting:
    """The pair in groups of as few GPUs of the fleet as take it, or with a target in fp8.

    Raises:
        ValueError: It does not fit.
    """
    setting = replace(setting, gpu=fleet.gpu, context=clip.prompt, draft_gpus=1)
    for size in (2.0, 1.0):
        for gpus in TENSOR_PARALLEL if fleet.gpus is None else (fleet.gpus,):
            tried = replace(setting, gpus=gpus, weight_bytes=(size, setting.weight_bytes[1]))
            if gpus <= fleet.count and limit(tried).fits:
                return tried
    raise ValueError(
        f"{setting.target.name} <- {setting.draft.name}: expected a pair that fits into "
        f"{fleet.gpus or fleet.count} x {fleet.gpu.name}, got a larger one"
    )
