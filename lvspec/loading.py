"""Checkpoints to a pair that can decode together."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lvspec.families import Family, check_family
from lvspec.quantization import Weights, quantize
from lvspec.video.processor import HFProcessor, Processor


@dataclass(frozen=True)
class Pair:
    """A target, a draft, and what turns a video and a prompt into the inputs of both."""

    target: PreTrainedModel
    draft: PreTrainedModel
    processor: Processor | HFProcessor
    draft_processor: Processor | HFProcessor


def load_pair(
    target: str | os.PathLike,
    draft: str | os.PathLike,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    draft_weights: Weights | None = None,
) -> Pair:
    """Load two checkpoints of a supported family, from folders or the hub's cache.

    Weights are read from safetensors only, and remote code is never run.

    Args:
        target: The big model.
        draft: The small one, with the same tokenizer.
        dtype: "auto" is the checkpoint's own.
        device: Where both go.
        draft_weights: "int8", "int4" or "fp8": the draft is quantised, see `lvspec.quantize`. None:
            as it is.

    Raises:
        ImportError: HF's processor of a family, or `draft_weights`, needs something that is not
            installed.
        OSError: There is no checkpoint, or none with safetensors.
        ValueError: An unsupported family, the tokenizers differ, or the draft cannot be quantised
            so.
    """
    for role, path in (("target", target), ("draft", draft)):
        check_checkpoint(path, role)
    processor, draft_processor = load_processor(target, "target"), load_processor(draft, "draft")
    check_same_tokenizer(processor.tokenizer, draft_processor.tokenizer)
    draft_model = load_model(draft, dtype=dtype, device=device)
    if draft_weights is not None:  # before the target is read: what cannot be done is said soon
        quantize(draft_model, draft_weights)
    return Pair(
        load_model(target, dtype=dtype, device=device), draft_model, processor, draft_processor
    )


def check_checkpoint(path: str | os.PathLike, role: str) -> Family:
    """The family of a checkpoint; an unsupported one is refused before its weights are read.

    Raises:
        OSError: There is no checkpoint.
        ValueError: The family is not supported; names `role` and lists those that are.
    """
    return check_family(PreTrainedConfig.get_config_dict(path)[0].get("model_type"), role)


def load_processor(path: str | os.PathLike, role: str) -> Processor | HFProcessor:
    """What turns a video and a prompt into the inputs of a checkpoint.

    Raises:
        ImportError: HF's processor of the family needs something that is not installed.
        OSError, ValueError: As `check_checkpoint`.
    """
    chosen = Processor if check_checkpoint(path, role).patches_frames else HFProcessor
    return chosen.from_pretrained(path)


def load_model(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """One model, ready to run: safetensors only, no remote code."""
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    return model.to(device).eval()


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
