"""What the options of a sub-command say about checkpoints and devices, to models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lvspec.checkpoint import check_files, find_checkpoint
from lvspec.cli.options import DRAFT_WORDS, by_option
from lvspec.models.loading import (
    device_called,
    load_model,
    load_pair,
    load_part,
    load_processor,
    prepare_alike,
)
from lvspec.models.quantize import Weights
from lvspec.models.ranks import join
from lvspec.phases.draft import DraftChoice
from lvspec.shapes import pair as embedded
from lvspec.video.processor import HFProcessor, Processor


@dataclass(frozen=True)
class Models:
    """A target, perhaps a draft, and their processors.

    Attributes:
        draft: A model, "self", "ngram", or None for nobody.
        draft_processor: None where the draft takes the target's inputs.
        folders: Checkpoints of the processors that there are.
    """

    target: PreTrainedModel
    draft: DraftChoice
    processor: Processor | HFProcessor
    draft_processor: Processor | HFProcessor | None
    folders: tuple[Path, ...]


def find_device(name: str | None) -> torch.device:
    """The device of this name; None is a GPU where there is one, else the CPU.

    Raises:
        ValueError: No such device is here.
    """
    return device_called(name, "--device")


def load_models(
    target: str | None,
    draft: str | None,
    *,
    with_draft: bool,
    dtype: str,
    device: torch.device,
    draft_weights: Weights | None = None,
    target_weights: Weights | None = None,
    tensor_parallel: bool = False,
) -> Models:
    """The models of `--target` and `--draft`, or those of the embedded pair.

    Args:
        target: A checkpoint; None: the embedded one.
        draft: A checkpoint, "self" or "ngram"; None: the embedded one.
        with_draft: Whether there is a draft at all.
        dtype, device: Of both.
        draft_weights, target_weights: As for `lvspec.models.loading.load_pair`.
        tensor_parallel: The same; `device` is then not looked at.

    Raises:
        OSError, ValueError: See `lvspec.models.loading.load_pair`; or a checkpoint is damaged.
    """
    has_model = with_draft and draft not in DRAFT_WORDS
    if target is None:
        if not (embedded.TARGET / "model.safetensors").is_file():
            raise FileNotFoundError(
                "--target, --draft: expected both, because this installation is without the "
                "weights of the embedded pair"
            )
        dtype = "float32" if dtype == "auto" else dtype
        folders = [embedded.TARGET, embedded.DRAFT]
    else:
        folders = [_complete(target, "--target")]
        folders += [_complete(draft, "--draft")] if has_model else []
    try:
        if not has_model:
            processor = load_processor(folders[0], "target")
            if tensor_parallel:
                ranks = join()
                with ranks.telling():
                    model = load_part(folders[0], ranks, dtype=dtype)
                processor = replace(processor, device=model.device)
            else:
                model = load_model(
                    folders[0], "target", dtype=dtype, device=device, weights=target_weights
                )
            return Models(model, draft if with_draft else None, processor, None, (folders[0],))
        place = {"tensor_parallel": True} if tensor_parallel else {"device": device}
        weights = {"draft_weights": draft_weights, "target_weights": target_weights}
        pair = load_pair(*folders, dtype=dtype, **weights, **place)
    except (OSError, ValueError) as error:
        if str(error).startswith("tensor_parallel:"):
            raise type(error)(by_option(error, {"tensor_parallel": "--tensor-parallel"})) from error
        raise
    except torch.OutOfMemoryError as error:
        raise OSError(f"--device {device}: the models do not fit into its memory") from error
    except Exception as error:
        # Whatever transformers and safetensors raise for a file that is not what it should be.
        raise ValueError(
            f"{', '.join(map(str, folders))}: expected checkpoints that transformers loads, got "
            f"{type(error).__name__}: {error}"
        ) from error
    same_inputs = prepare_alike(pair.processors, folders)
    draft_processor, *others = (None,) if same_inputs else (pair.draft_processor, folders[1])
    folders = (folders[0], *others)
    return Models(pair.target, pair.draft, pair.processor, draft_processor, folders)


def _complete(name: str, option: str) -> Path:
    folder = find_checkpoint(name, option)
    check_files(folder, option)
    return folder


def token_ids_of(words: list[str], processor: Processor | HFProcessor) -> tuple[int, ...]:
    """Ids of all tokens that `words` are spelled with, at the start of a text and within one.

    Raises:
        ValueError: The tokenizer does not know a word.
    """
    tokenizer = processor.tokenizer
    found: set[int] = set()
    for word in words:
        spellings = (word, f" {word}")
        ids = {
            token
            for text in spellings
            for token in tokenizer.encode(text, add_special_tokens=False)
            if token != tokenizer.unk_token_id
        }
        if not ids:
            raise ValueError(f"--strict-words: expected words of the tokenizer, got {word!r}")
        found |= ids
    return tuple(sorted(found))
