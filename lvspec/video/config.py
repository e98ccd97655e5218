"""How frames become patches, as HuggingFace's configuration files say it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# Files that hold a video processor's configuration, in HuggingFace's order.
NESTED_FILE = "processor_config.json"
CONFIG_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")

# Pillow's numbers, which HuggingFace's configuration files use.
RESAMPLE_MODES = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class VideoProcessorConfig:
    """How frames become patches; the defaults are those of HuggingFace's Qwen2VLVideoProcessor.

    Attributes:
        patch_size: pixels along the side of a patch.
        temporal_patch_size: frames in a patch.
        merge_size: patches along the side of the square that becomes one token.
        min_pixels: smaller frames are enlarged to this area; HuggingFace's `size["shortest_edge"]`.
        max_pixels: larger frames are shrunk to this area; HuggingFace's `size["longest_edge"]`.
        do_resize: resize to the nearest allowed size; if False, frames must have one already.
        resample: "bicubic" or "bilinear", both with antialiasing.
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: 1/255 takes uint8 to [0, 1].
        do_normalize: subtract `image_mean` and divide by `image_std`.
        image_mean: one number a channel, after rescaling.
        image_std: one number a channel, after rescaling.
        cap_pixels_per_frame: bound the area of all frames together too, as qwen-vl-utils does.
        max_video_tokens: the bound for `cap_pixels_per_frame`: 90 % of this many tokens.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    do_resize: bool = True
    resample: str = "bicubic"
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 128000

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} exceeds max_pixels={self.max_pixels}")
        if self.resample not in RESAMPLE_MODES.values():
            raise ValueError(f"resample must be 'bicubic' or 'bilinear', got {self.resample!r}")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} must have three numbers, got {getattr(self, name)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VideoProcessorConfig:
        """Reads the contents of one of HuggingFace's files; keys of no meaning here are ignored.

        Raises:
            ValueError: the configuration belongs to another family of video processors.
        """
        kind = values.get("video_processor_type") or values.get("image_processor_type")
        if kind is not None and not kind.startswith(("Qwen2VL", "Qwen2_5_VL", "Qwen2_5VL")):
            raise ValueError(
                f"only Qwen2-VL and Qwen2.5-VL preprocessing is implemented in torch, got {kind}: "
                "install torchvision to use HuggingFace's own"
            )
        names = [field.name for field in fields(cls)]
        known = {name: values[name] for name in names if values.get(name) is not None}
        size = values.get("size") or {}
        for name, key in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if size.get(key) is not None:
                known.setdefault(name, size[key])
        if isinstance(known.get("resample"), int):
            if known["resample"] not in RESAMPLE_MODES:
                raise ValueError(
                    f"resample must be 2 (bilinear) or 3 (bicubic), got {known['resample']}"
                )
            known["resample"] = RESAMPLE_MODES[known["resample"]]
        for name in ("image_mean", "image_std"):
            if name in known:
                known[name] = tuple(known[name])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `video_preprocessor_config.json`, as HuggingFace reads it."""
        values = asdict(self)
        size = {"shortest_edge": values.pop("min_pixels"), "longest_edge": values.pop("max_pixels")}
        resample = next(key for key, mode in RESAMPLE_MODES.items() if mode == self.resample)
        values |= {"size": size, "resample": resample}
        values |= {"image_mean": list(self.image_mean), "image_std": list(self.image_std)}
        return values | {"video_processor_type": "Qwen2VLVideoProcessor"}

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> VideoProcessorConfig:
        """Reads the configuration saved with a model, in any of HuggingFace's three files for it.

        Args:
            path: a folder, one such file, or the name of a model on the HuggingFace hub.

        Raises:
            FileNotFoundError: there is no configuration.
            ValueError: the file is not JSON, or of another family of video processors.
        """
        return cls.from_dict(_read_config(path))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `video_preprocessor_config.json` into `folder`, which is made if absent.

        Raises:
            FileExistsError: the folder's `processor_config.json` holds another video processor,
                which would be read first.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        nested = folder / NESTED_FILE
        if nested.exists() and "video_processor" in _read_json(nested):
            raise FileExistsError(
                f"{nested} holds a video processor, which would be read instead of this one"
            )
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILES[0]).write_text(text, encoding="utf-8")


def _read_config(path: str | os.PathLike) -> dict[str, Any]:
    if os.path.isfile(path):
        values = _read_json(path)
        return values.get("video_processor", values)
    if os.path.isdir(path):
        found = {name: Path(path) / name for name in (NESTED_FILE, *CONFIG_FILES)}
        found = {name: file for name, file in found.items() if file.exists()}
    else:
        from transformers.utils import cached_file

        found = {}
        for name in (NESTED_FILE, *CONFIG_FILES):
            try:
                file = cached_file(
                    os.fspath(path), name, _raise_exceptions_for_missing_entries=False
                )
            except OSError as error:
                raise FileNotFoundError(
                    f"neither a folder, a file nor a model on the HuggingFace hub: {path} ({error})"
                ) from error
            if file is not None:
                found[name] = file
    if NESTED_FILE in found:
        values = _read_json(found.pop(NESTED_FILE))
        if "video_processor" in values:
            return values["video_processor"]
    for file in found.values():
        return _read_json(file)
    raise FileNotFoundError(
        f"no video processor configuration in {path}, expected one of "
        + ", ".join((NESTED_FILE, *CONFIG_FILES))
    )


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"not a JSON file: {path} ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(values).__name__}")
    return values
