"""Frames to the inputs of a Qwen2-VL or Qwen2.5-VL vision tower.

HuggingFace's video processor does this where it can be imported; it needs torchvision. The same
steps are here in plain torch, with equal results: `preprocess_video`. `load_video_processor`
chooses between the two and hides the difference.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lvspec.video.files import Video
from lvspec.video.frames import check_frames
from lvspec.video.streams import FALLBACK_FPS

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
    def from_dict(cls, values: dict[str, Any]) -> "VideoProcessorConfig":
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
    def from_pretrained(cls, path: str | os.PathLike) -> "VideoProcessorConfig":
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


class VideoInputs(NamedTuple):
    """What a model's forward takes for one video; `_asdict()` gives keyword arguments.

    Attributes:
        pixel_values_videos: float32 `[num_patches, 3 * temporal_patch_size * patch_size ** 2]`, or
            what another family's processor returns.
        video_grid_thw: int64 `[1, 3]`: patches in time, height and width. None for families that
            have no grid.
        second_per_grid_ts: float32 `[1]`: seconds from one step of the grid to the next.
    """

    pixel_values_videos: Tensor
    video_grid_thw: Tensor | None
    second_per_grid_ts: Tensor


@dataclass(frozen=True, eq=False)
class VideoProcessor:
    """Frames to model inputs; made by `load_video_processor`.

    Attributes:
        backend: "hf" or "torch", whichever computes.
        temporal_patch_size: frames in one step of the grid.
    """

    backend: str
    temporal_patch_size: int
    _patches: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    def process(self, video: Video | Tensor, *, sampled_fps: float | None = None) -> VideoInputs:
        """Prepares one video.

        Args:
            video: a `Video`, or its frames as uint8 `[T, H, W, 3]`, RGB.
            sampled_fps: frames per second of `video`. Left out, a `Video` knows, and bare frames
                count as 24, as they do for HuggingFace.

        Returns:
            `VideoInputs`, on the device of the frames.

        Raises:
            TypeError: the frames are not a uint8 tensor.
            ValueError: they have the wrong shape, or `sampled_fps` is not positive.
        """
        known_fps = isinstance(video, Video)
        frames = video.frames if known_fps else video
        if sampled_fps is None:
            sampled_fps = video.sampled_fps if known_fps else FALLBACK_FPS
        if not (sampled_fps > 0 and math.isfinite(sampled_fps)):
            raise ValueError(f"sampled_fps must be positive and finite, got {sampled_fps}")
        check_frames(frames)
        patches, grid = self._patches(frames)
        seconds = torch.tensor([self.temporal_patch_size / sampled_fps], device=frames.device)
        return VideoInputs(patches, grid, seconds)


def load_video_processor(
    source: str | os.PathLike | VideoProcessorConfig, backend: str = "auto"
) -> VideoProcessor:
    """Chooses who preprocesses videos for a model.

    Args:
        source: a folder or file of a saved model, the name of a model on the HuggingFace hub, or a
            configuration.
        backend: "hf" is HuggingFace's video processor, "torch" is `preprocess_video`, "auto" is the
            first where it can be imported and the second elsewhere.

    Raises:
        ImportError: "hf" was asked for and cannot be imported.
        FileNotFoundError: no configuration in `source`.
        ValueError: an unknown `backend`, or a family that `preprocess_video` does not know.
    """
    if backend not in ("auto", "hf", "torch"):
        raise ValueError(f"backend must be 'auto', 'hf' or 'torch', got {backend!r}")
    if backend != "torch":
        obstacle = _huggingface_obstacle()
        if obstacle is None:
            return _huggingface_processor(source)
        if backend == "hf":
            raise ImportError(
                "backend='hf' needs pillow and the torchvision that matches this torch: "
                f"pip install pillow torchvision, or use backend='torch' ({obstacle})"
            ) from obstacle
    if isinstance(source, VideoProcessorConfig):
        config = source
    else:
        config = VideoProcessorConfig.from_pretrained(source)
    patches = partial(preprocess_video, config=config)
    return VideoProcessor("torch", config.temporal_patch_size, patches)


def preprocess_video(frames: Tensor, config: VideoProcessorConfig) -> tuple[Tensor, Tensor]:
    """Resizes, normalises and cuts frames into patches, as HuggingFace's Qwen2-VL processor does.

    Args:
        frames: uint8 `[T, H, W, 3]`, RGB, any device.
        config: sizes and constants.

    Returns:
        `pixel_values_videos` float32 `[num_patches, 3 * temporal_patch_size * patch_size ** 2]`:
        patches in the order in which the vision tower merges them (time, then squares of
        `merge_size`, then patches within a square), each as channel, frame, row, column.
        `video_grid_thw` int64 `[1, 3]`: patches in time, height and width; their product is
        num_patches. Frames that do not fill a temporal patch are followed by copies of the last.

    Raises:
        TypeError: `frames` is not a uint8 tensor.
        ValueError: wrong shape, an aspect ratio above 200, or a size that is not allowed while
            `do_resize` is off.
    """
    check_frames(frames)
    images = frames.permute(0, 3, 1, 2).contiguous()
    return _patchify(_normalize(_resize(images, config), config), config)


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Rounds a size to multiples of `factor` with an area within the limits, in pixels.

    Returns:
        Height and width, of about the same ratio as before.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"one side may be 200 times the other at most, got {height}x{width}")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        enlarge = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * enlarge / factor) * factor
        new_width = math.ceil(width * enlarge / factor) * factor
    return new_height, new_width


def _resize(images: Tensor, config: VideoProcessorConfig) -> Tensor:
    """uint8 `[T, 3, H, W]` to uint8 `[T, 3, H', W']` with sides that are whole merge squares."""
    num_frames, _, height, width = images.shape
    factor = config.patch_size * config.merge_size
    if not config.do_resize:
        if height % factor or width % factor:
            raise ValueError(
                "with do_resize=False, height and width must be multiples of patch_size * "
                f"merge_size = {factor}, got {height}x{width}"
            )
        return images
    max_pixels = config.max_pixels
    if config.cap_pixels_per_frame:
        budget = int(config.max_video_tokens * factor * factor * 0.9)
        share = budget * config.temporal_patch_size // num_frames
        max_pixels = max(min(max_pixels, share), int(config.min_pixels * 1.05))
    size = smart_resize(
        height, width, factor=factor, min_pixels=config.min_pixels, max_pixels=max_pixels
    )
    if size == (height, width):
        return images
    # As torchvision does, so that roundings agree: CPUs work on bytes (for bilinear weights, those
    # with AVX), other devices go through float32.
    in_bytes = images.device.type == "cpu" and (
        config.resample == "bicubic"
        or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    )
    resized = functional.interpolate(
        images if in_bytes else images.float(),
        size=size,
        mode=config.resample,
        align_corners=False,
        antialias=True,
    )
    return resized if in_bytes else resized.clamp_(0, 255).round_().to(torch.uint8)


def _normalize(images: Tensor, config: VideoProcessorConfig) -> Tensor:
    """uint8 `[T, 3, H, W]` to float32."""
    images = images.float()
    if config.do_normalize:
        # HuggingFace folds the factor into mean and deviation: this is its order of roundings.
        unit = 1.0 / config.rescale_factor if config.do_rescale else 1.0
        mean = torch.tensor(config.image_mean, device=images.device) * unit
        std = torch.tensor(config.image_std, device=images.device) * unit
        return images.sub_(mean[:, None, None]).div_(std[:, None, None])
    return images * config.rescale_factor if config.do_rescale else images


def _patchify(images: Tensor, config: VideoProcessorConfig) -> tuple[Tensor, Tensor]:
    """float32 `[T, 3, H, W]` to the patches and the grid that `preprocess_video` returns."""
    patch, merge, temporal = config.patch_size, config.merge_size, config.temporal_patch_size
    missing = -len(images) % temporal
    if missing:
        images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
    num_frames, channels, height, width = images.shape
    grid = (num_frames // temporal, height // patch, width // patch)
    patches = images.view(
        grid[0], temporal, channels, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
    )
    # Now: time, square's row and column, row and column in the square; then the inside of a patch.
    patches = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    patches = patches.reshape(math.prod(grid), channels * temporal * patch * patch)
    return patches, torch.tensor([grid], device=images.device)


def _huggingface_obstacle() -> Exception | None:
    try:
        import PIL  # noqa: F401
        import torchvision  # noqa: F401
    except Exception as error:  # a torchvision that does not match torch fails in many ways
        return error
    return None


def _huggingface_processor(source: str | os.PathLike | VideoProcessorConfig) -> VideoProcessor:
    from transformers import AutoVideoProcessor, Qwen2VLVideoProcessor

    if isinstance(source, VideoProcessorConfig):
        processor = Qwen2VLVideoProcessor(**source.to_dict())
    else:
        processor = AutoVideoProcessor.from_pretrained(source)
    if getattr(processor, "cap_pixels_per_frame", False) is None:
        # Not set means no cap, with a warning that this will change. Results here shall not.
        processor.cap_pixels_per_frame = False

    def patches(frames: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs = processor(
            [frames.permute(0, 3, 1, 2)],
            do_sample_frames=False,
            input_data_format="channels_first",
            return_tensors="pt",
        )
        return inputs["pixel_values_videos"], inputs.get("video_grid_thw")

    return VideoProcessor("hf", getattr(processor, "temporal_patch_size", 1), patches)


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
