"""Checkpoints to a pair that can decode together."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig

from lvspec.checkpoint import check_files, find_checkpoint, names_of
from lvspec.models.families import Family, check_family
from lvspec.models.quantize import Weights, quantize
from lvspec.models.ranks import ALONE, Ranks, join
from lvspec.models.shards import check_can_be_spread, take_shards
from lvspec.video.config import VideoProcessorConfig
from lvspec.video.processor import HFProcessor, Processor

DeviceMap = str | dict[str, Any] | int | torch.device
"""As `from_pretrained` takes it: "auto", or a device for each module by name."""


@dataclass(frozen=True)
class Pair:
    """A target, a draft, and what turns a video and a prompt into the inputs of both."""

    target: PreTrainedModel
    draft: PreTrainedModel
    processor: Processor | HFProcessor
    draft_processor: Processor | HFProcessor

    @property
    def processors(self) -> tuple[Processor | HFProcessor, Processor | HFProcessor]:
        """The target's and the draft's."""
        return self.processor, self.draft_processor


def load_pair(
    target: str | os.PathLike,
    draft: str | os.PathLike,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    device_map: DeviceMap | None = None,
    draft_weights: Weights | None = None,
    target_weights: Weights | None = None,
    tensor_parallel: bool = False,
) -> Pair:
    """Load two checkpoints of a supported family, from folders or the hub's cache.

    Weights are read from safetensors only, remote code is never run, and nothing is downloaded:
    `hf download NAME` does that. The processors put what they return where the models are.

    Args:
        target: The big model.
        draft: The small one, with the same tokenizer.
        dtype: "auto" is the checkpoint's own.
        device: Where both go; None is a GPU where there is one, else the CPU.
        device_map: Where the modules of the target go, as `from_pretrained` takes it (needs
            accelerate), for one that does not fit into one GPU; excludes `device`. The draft goes
            whole to where the target's embeddings are. Over several devices iterations are run
            eagerly, which `stats.loop` says.
        draft_weights: "int8", "int4" or "fp8": the draft is quantised, see `lvspec.quantize`. None:
            as it is.
        target_weights: The same of the target, whose head stays as it is; excludes `device_map` and
            `tensor_parallel`. Its weights are read from the files as they are quantised, one layer
            after the other: neither the device nor the host has room for all of them as they were.
            What it says is then its own, not what the target says without.
        tensor_parallel: Whether this process is one of those that torchrun has started to share the
            target: each loads its part by transformers' `tp_plan`, on the GPU of its number or the
            CPU, and the whole draft. All of them then make the same calls, and have the same
            results. Excludes `device` and `device_map`.

    Warns:
        UserWarning: A checkpoint has tensors that its model does not use; names them.

    Raises:
        ImportError: HF's processor of a family, `device_map`, `draft_weights` or `target_weights`
            needs something that is not installed.
        OSError: There is no checkpoint, or not all of it: no safetensors, shards that are missing,
            pointers of git-lfs.
        ValueError: An unsupported family; no chat template; the tokenizers differ; tensors are
            missing or have other shapes than the model's, by name; a model cannot be quantised so;
            the processes are not torchrun's, or their number does not divide the target's heads.
    """
    places = {"device": device, "device_map": device_map, "tensor_parallel": tensor_parallel}
    given = {name: x for name, x in places.items() if x is not None and x is not False}
    if target_weights is not None:
        given = {"target_weights": target_weights, **given}
        given.pop("device", None)
    if len(given) > 1:
        shown = " and ".join(f"{name}={place!r}" for name, place in given.items())
        raise ValueError(f"{', '.join(given)}: expected one of them, got {shown}")
    target, draft = find_checkpoint(target, "target"), find_checkpoint(draft, "draft")
    for role, folder in (("target", target), ("draft", draft)):
        check_checkpoint(folder, role)
        check_files(folder, role)
    processor, draft_processor = load_processor(target, "target"), load_processor(draft, "draft")
    check_same_tokenizer(processor.tokenizer, draft_processor.tokenizer)
    ranks = join() if tensor_parallel else ALONE
    with ranks.telling():
        if tensor_parallel:
            target_model = load_part(target, ranks, dtype=dtype)
            device = target_model.device
        elif device_map is not None:
            target_model = load_model(target, "target", dtype=dtype, device_map=device_map)
            device = target_model.device
        elif device is None:
            device = default_device()
        # Before the target is read: what cannot be done is said soon.
        draft_model = load_model(draft, "draft", dtype=dtype, device=device, weights=draft_weights)
        if device_map is None and not tensor_parallel:
            target_model = load_model(
                target, "target", dtype=dtype, device=device, weights=target_weights
            )
    processors = (replace(each, device=device) for each in (processor, draft_processor))
    return Pair(target_model, draft_model, *processors)


def default_device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_called(name: str | None, argument: str = "device") -> torch.device:
    """The device of this name; None is `default_device()`.

    Args:
        name: cpu, cuda or cuda:N.
        argument: What gave the name, for messages.

    Raises:
        ValueError: No such device is here.
    """
    if name is None:
        return default_device()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = " or ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"{argument}: expected {here}, got {name}")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"{argument}: expected {here}, got {name}, which is not here")
    return device


def prepare_alike(processors: Sequence[Processor | HFProcessor], folders: Sequence[Path]) -> bool:
    """Whether both processors, loaded from these two folders, make the same inputs."""
    if any(isinstance(processor, HFProcessor) for processor in processors):
        kinds = [type(getattr(processor, "hf", processor)) for processor in processors]
        return kinds[0] is kinds[1] and processors[0].hf.to_dict() == processors[1].hf.to_dict()
    configs = [VideoProcessorConfig.from_pretrained(folder) for folder in folders]
    return configs[0] == configs[1]


def check_checkpoint(folder: Path, role: str) -> Family:
    """The family of a checkpoint; an unsupported one is refused before its weights are read.

    Raises:
        OSError: There is no checkpoint.
        ValueError: The family is not supported; names `role` and lists those that are.
    """
    return check_family(PreTrainedConfig.get_config_dict(folder)[0].get("model_type"), role)


def load_processor(folder: Path, role: str) -> Processor | HFProcessor:
    """What turns a video and a prompt into the inputs of a checkpoint.

    Raises:
        ImportError: HF's processor of the family needs something that is not installed.
        OSError, ValueError: As `check_checkpoint`; or there is no chat template.
    """
    chosen = Processor if check_checkpoint(folder, role).patches_frames else HFProcessor
    processor = chosen.from_pretrained(folder)
    if processor.chat_template is None:
        raise ValueError(
            f"{role}: expected a chat template in {folder} (chat_template.jinja), got none (copy "
            "the file from the model that it was trained from)"
        )
    return processor


def load_model(
    folder: Path,
    role: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    device_map: DeviceMap | None = None,
    weights: Weights | None = None,
    parts: int = 1,
) -> PreTrainedModel:
    """One model, ready to run: safetensors only, no remote code, every weight from the checkpoint.

    Args:
        folder: From `find_checkpoint`.
        role: "target" or "draft", for messages.
        dtype, device, device_map: As for `load_pair`.
        weights: Its `draft_weights` or `target_weights`.
        parts: Processes, all of this run, over which transformers spreads it.

    Raises:
        ImportError: `device_map` or `weights` needs something that is not installed.
        ValueError: Tensors are missing or have other shapes, by name; or `device_map` offloads the
            modules that the model begins with; or it cannot be quantised so.
    """
    spread = {"distributed_config": DistributedConfig(tp_size=parts)} if parts > 1 else {}
    model, found = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=dtype,
        device_map=device_map,
        **spread,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # to name all of them; HF fills them with random numbers
    )
    missing, mismatched = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    if missing:
        raise ValueError(
            f"{role}: expected every weight of {type(model).__name__} in {folder}, got none for "
            f"{len(missing)} tensors: {names_of(missing)}"
        )
    if mismatched:
        shapes = names_of(
            f"{name} {list(got)} where the config says {list(wanted)}"
            for name, got, wanted in mismatched
        )
        raise ValueError(
            f"{role}: expected weights of the shapes that the config says in {folder}, got "
            f"{len(mismatched)} others: {shapes}"
        )
    unexpected = sorted(found["unexpected_keys"])
    if unexpected:
        warnings.warn(
            f"{role}: {folder} has {len(unexpected)} tensors that {type(model).__name__} does not "
            f"use: {names_of(unexpected)}",
            stacklevel=2,
        )
    if parts > 1:
        return model.eval()  # transformers has put it where it belongs
    if device_map is None:
        device = default_device() if device is None else device
        if weights is None:
            model = model.to(device)
        else:  # HF maps the files into memory: what is not looked at takes no room
            quantize(model, weights, head=role == "draft", device=device)
    elif model.device.type == "meta":  # where the caches and inputs go is where the model begins
        raise ValueError(
            f"device_map: expected the first modules of the {role} on a device, got them offloaded"
        )
    return model.eval()


def load_part(folder: Path, ranks: Ranks, *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """This process's part of a target, see `load_pair(tensor_parallel=True)`.

    Args:
        folder, dtype: As for `load_model`.
        ranks: Of `join`.

    Raises:
        ValueError: As `load_pair`.
    """
    check_can_be_spread(AutoConfig.from_pretrained(folder), ranks.size)
    if ranks.size == 1:
        return load_model(folder, "target", dtype=dtype, device=ranks.device)
    model = load_model(folder, "target", dtype=dtype, parts=ranks.size)
    take_shards(model, ranks)
    return model


def check_same_tokenizer(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Refuse tokenizers that give an id different meanings.

    How far the models pad their vocabularies beyond the tokenizer does not matter.

    Raises:
        ValueError: Names the first id that differs.
    """
    target_tokens, draft_tokens = (
        {index: token for token, index in tokenizer.get_vocab().items()}
        for tokenizer in (target, draft)
    )
    for index in sorted(target_tokens.keys() | draft_tokens.keys()):
        wanted, got = target_tokens.get(index), draft_tokens.get(index)
        if wanted != got:
            raise ValueError(
                f"draft: expected the target's tokenizer, but token id {index} is {wanted!r} for "
                f"the target and {got!r} for the draft"
            )
