"""Where a checkpoint is and whether it is all there, before its weights are read.

Nothing is downloaded: a checkpoint is a folder, or a name that `hf download` has fetched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LEGACY_TEMPLATE = "chat_template.json"

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_SIZE = 1024  # bytes that git-lfs allows one


def find_checkpoint(path: str | os.PathLike, role: str) -> Path:
    """The folder of a checkpoint, given by its path or by its name in the hub's cache.

    Args:
        path: A folder, or a name such as `Qwen/Qwen2.5-VL-7B-Instruct`.
        role: What it is, for messages.

    Raises:
        OSError: There is none; names `role`.
    """
    name = os.fspath(path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / CONFIG).is_file():
            return folder
        raise FileNotFoundError(f"{role}: expected a folder with {CONFIG} in it, got {name}")
    if folder.exists():
        raise NotADirectoryError(f"{role}: expected the folder of a checkpoint, got file {name}")
    try:
        config = try_to_load_from_cache(name, CONFIG)
        fetches = f" (if it is on the hub, `hf download {name}` fetches it)" if "/" in name else ""
    except HFValidationError:  # no name that the hub could know
        config, fetches = None, ""
    if not isinstance(config, str):
        raise FileNotFoundError(
            f"{role}: expected the folder of a checkpoint, or the name of one in the hub's cache, "
            f"got {name}, which is neither{fetches}"
        )
    return Path(config).parent


def check_files(folder: Path, role: str) -> None:
    """Refuse a checkpoint whose files are not all there.

    Args:
        folder: From `find_checkpoint`.
        role: What it is, for messages.

    Raises:
        OSError: Files are pointers of git-lfs, weights are pickled only, shards or all weights are
            missing; names `role`, the files and the way out.
        ValueError: The index of the shards is none.
    """
    pointers = [file for file in sorted(folder.iterdir()) if _is_pointer(file)]
    if pointers:
        raise OSError(
            f"{role}: expected the files of a checkpoint in {folder}, got pointers of git-lfs for "
            f"{names_of(file.name for file in pointers)} (`git lfs pull` there fetches them)"
        )
    wanted = _weight_files(folder)
    missing = [name for name in wanted if not (folder / name).is_file()]
    if not missing:
        return
    if missing != [WEIGHTS]:
        raise FileNotFoundError(
            f"{role}: expected the safetensors files in {folder} that its index or config lists, "
            f"got {len(missing)} of {len(wanted)} missing: {names_of(missing)}{_fetched(folder)}"
        )
    pickled = sorted(file.name for kind in _PICKLED for file in folder.glob(kind))
    if pickled:
        raise FileNotFoundError(
            f"{role}: expected weights as safetensors in {folder}, got {names_of(pickled)}, which "
            "may run code and is never read (where you trust it: load it with transformers and "
            "`save_pretrained` it again)"
        )
    raise FileNotFoundError(
        f"{role}: expected {WEIGHTS} or {INDEX} in {folder}, got neither{_fetched(folder)}"
    )


def legacy_chat_template(path: str | os.PathLike) -> str | None:
    """The template in the file that HF's processors read and its tokenizers do not, if any.

    Raises:
        ValueError: The file is not what it should be.
    """
    file = Path(path) / LEGACY_TEMPLATE
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["chat_template"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected JSON with a chat_template, got {error}") from error


def names_of(names: Iterable[str], *, most: int = 5) -> str:
    """Names in a row, and how many more there are."""
    found = list(names)
    rest = len(found) - most
    return ", ".join(found[:most]) + (f" and {rest} more" if rest > 0 else "")


def _weight_files(folder: Path) -> list[str]:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    chosen = config.get("transformers_weights") or (
        INDEX if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file() else WEIGHTS
    )
    if not chosen.endswith(".index.json") or not (folder / chosen).is_file():
        return [chosen]
    try:
        index = json.loads((folder / chosen).read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / chosen}: expected JSON with a weight_map, got {type(error).__name__}: "
            f"{error}"
        ) from error


def _is_pointer(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size >= _POINTER_SIZE:
        return False
    with file.open("rb") as content:
        return content.read(len(_POINTER)) == _POINTER


def _fetched(folder: Path) -> str:
    """How to fetch what is missing, for a snapshot in the hub's cache."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return ""
    name = repository.removeprefix("models--").replace("--", "/")
    return f" (`hf download {name}` fetches the rest)"
