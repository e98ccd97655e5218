"""A video file and a prompt to the inputs of a model.

HF's video processors need torchvision. For Qwen2-VL and Qwen2.5-VL, `Processor` needs a tokenizer
with a chat template and a video processor's configuration only, and gives the same inputs. For
other families, `HFProcessor` calls HF's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from lvspec.checkpoint import find_checkpoint, legacy_chat_template
from lvspec.video.files import Resize, Video, read_video
from lvspec.video.frames import as_frames
from lvspec.video.hf_resizing import frame_resize
from lvspec.video.patches import VideoProcessor, load_video_processor
from lvspec.video.streams import FALLBACK_FPS

DEFAULT_FPS = 2.0  # frames per second that Qwen2.5-VL samples unless told otherwise


@dataclass(frozen=True)
class Processor:
    """Tokenizer and video processor of one checkpoint.

    Attributes:
        tokenizer: With a chat template that knows video content.
        video_processor: See `lvspec.video.patches`.
        video_token_id: The placeholder that one video token replaces.
        merge_size: Patches along the side of the square that becomes one video token.
        device: Where tensors go unless a call says another; None: the CPU.
    """

    tokenizer: PreTrainedTokenizerBase
    video_processor: VideoProcessor
    video_token_id: int
    merge_size: int
    device: torch.device | str | None = None

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> Processor:
        """From a folder with a saved checkpoint, or a name in the hub's cache. No remote code.

        Raises:
            OSError: There is no checkpoint.
        """
        folder = find_checkpoint(path, "path")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = legacy_chat_template(folder)
        return cls(
            tokenizer,
            load_video_processor(folder),
            config.video_token_id,
            config.vision_config.spatial_merge_size,
        )

    def __call__(
        self,
        video: str | os.PathLike | Video | Tensor | np.ndarray | Sequence[Any],
        prompt: str | Sequence[str],
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Inputs for `lvspec.generate` and for HF's `generate`.

        Args:
            video: A file, whose frames are resized while it is decoded; a `Video` that was read
                before; or its frames alone: uint8 `[T, H, W, 3]`, RGB, a tensor or an array, or a
                list of T frames `[H, W, 3]` (tensors, arrays, PIL images).
            prompt: What the user says. If it has the video placeholder in it, it is taken as the
                whole prompt, chat markup included; otherwise the chat template is put around it.
                Several prompts, a list, are about one video, which is read once.
            num_frames: Frames to sample from a file, at least 2. Excludes `fps`; neither goes with
                a `Video`.
            fps: Frames per second to sample from a file; `DEFAULT_FPS` if neither is given. With
                frames alone: how many of them are a second, 24 if not given, as for HF.
            device: Where the tensors go; None is the processor's own.

        Returns:
            input_ids, attention_mask, mm_token_type_ids int64 `[1, T]`; pixel_values_videos,
            video_grid_thw and second_per_grid_ts as `VideoProcessor.process` returns them. Of
            several prompts a list of these, which share what is the video's.

        Raises:
            FileNotFoundError, ImportError, ValueError: From `read_video`; or frames are to be
                sampled that are of no file; or the prompt has no placeholder for the video, or more
                than one.
            TypeError: The frames are not uint8.
        """
        sampled, resized = _sampled(video, num_frames, fps, self.video_processor.resize)
        features = self.video_processor.process(sampled, resized=resized)
        device = self.device if device is None else device
        shared = {name: value.to(device) for name, value in features._asdict().items()}
        count = int(features.video_grid_thw.prod()) // self.merge_size**2
        found = [
            {**self._of_text(each, count, device), **shared}
            for each in ([prompt] if isinstance(prompt, str) else prompt)
        ]
        return found[0] if isinstance(prompt, str) else found

    def _of_text(
        self, prompt: str, count: int, device: torch.device | str | None
    ) -> dict[str, Tensor]:
        """Of a prompt what has a number for each token, `count` of them the video's."""
        placeholder = self.tokenizer.convert_ids_to_tokens(self.video_token_id)
        text = _chat_prompt(self.tokenizer, prompt, placeholder)
        text = text.replace(placeholder, placeholder * count)
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": 2 * (ids == self.video_token_id).long(),
        }
        return {name: value.to(device) for name, value in inputs.items()}

    @property
    def chat_template(self) -> str | None:
        return self.tokenizer.chat_template


@dataclass(frozen=True)
class HFProcessor:
    """HF's own processor of one checkpoint, called like `Processor`.

    Attributes:
        hf: With a video processor.
        device: Where tensors go unless a call says another; None: the CPU.
    """

    hf: ProcessorMixin
    device: torch.device | str | None = None

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike) -> HFProcessor:
        """From a folder with a saved checkpoint, or a name in the hub's cache. No remote code.

        Raises:
            ImportError: HF's processor needs something that is not installed.
            OSError: There is no checkpoint.
        """
        try:
            folder = find_checkpoint(path, "path")
            return cls(AutoProcessor.from_pretrained(folder, trust_remote_code=False))
        except ImportError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ImportError(
                f"{path}: expected what HF's processor of this family needs (pip install pillow "
                f"torchvision), got {reason}"
            ) from error

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.hf.tokenizer

    @property
    def chat_template(self) -> str | None:
        return self.hf.chat_template

    def __call__(
        self,
        video: str | os.PathLike | Video | Tensor | np.ndarray | Sequence[Any],
        prompt: str | Sequence[str],
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Inputs for `lvspec.generate` and for HF's `generate`; the arguments are `Processor`'s.

        Returns:
            The tensors that HF's processor returns; of several prompts a list.

        Raises:
            FileNotFoundError, ImportError, TypeError, ValueError: As `Processor`.
        """
        resize = frame_resize(self.hf.video_processor)
        sampled, resized = _sampled(video, num_frames, fps, resize)
        if not isinstance(prompt, str):
            return [self._of_text(each, sampled, resized, device) for each in prompt]
        return self._of_text(prompt, sampled, resized, device)

    def _of_text(
        self, prompt: str, sampled: Video, resized: bool, device: torch.device | str | None
    ) -> dict[str, Tensor]:
        text = _chat_prompt(self.hf, prompt, self.hf.video_token)
        bos = self.tokenizer.bos_token
        inputs = self.hf(
            text=[text],
            videos=[[sampled.frames.permute(0, 3, 1, 2)]],
            video_metadata=[[_metadata(sampled)]],
            do_sample_frames=False,
            **({"do_resize": False} if resized else {}),
            # As HF does where it applies a chat template: one that begins with it is complete.
            add_special_tokens=bos is None or not text.startswith(bos),
            return_tensors="pt",
        )
        device = self.device if device is None else device
        return {
            name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)
        }


def _sampled(
    video: str | os.PathLike | Video | Tensor | np.ndarray | Sequence[Any],
    num_frames: int | None,
    fps: float | None,
    resize: Resize,
) -> tuple[Video, bool]:
    """The video, read if it is a file, and whether it went through `resize`."""
    if isinstance(video, (str, bytes, os.PathLike)):
        fps = DEFAULT_FPS if fps is None and num_frames is None else fps
        return read_video(video, num_frames=num_frames, fps=fps, resize=resize), True
    if isinstance(video, Video):
        if num_frames is not None or fps is not None:
            raise ValueError(
                "num_frames, fps: expected None for a video that was read before, got "
                f"num_frames={num_frames}, fps={fps}"
            )
        return video, False
    frames = as_frames(video)
    if num_frames is not None:
        raise ValueError(
            f"num_frames: expected None for frames that are of no file, got {num_frames}"
        )
    rate = FALLBACK_FPS if fps is None else fps
    if not 0 < rate < math.inf:
        raise ValueError(f"fps: expected a number > 0, got {fps}")
    timestamps = torch.arange(len(frames), dtype=torch.float64) / rate
    return Video(frames, timestamps, len(frames) / rate, rate, ""), False


def sampled_times(
    path: str | os.PathLike, *, num_frames: int | None = None, fps: float | None = None
) -> list[float]:
    """Seconds of the frames that a processor samples from a file, called with these options.

    Raises:
        FileNotFoundError, ImportError, ValueError: As `Processor`.
    """
    # Of a frame that is not looked at, one pixel is kept.
    video, _ = _sampled(path, num_frames, fps, lambda frames, count: frames[:, :1, :1])
    return video.timestamps.tolist()


def _chat_prompt(
    template: PreTrainedTokenizerBase | ProcessorMixin, prompt: str, placeholder: str
) -> str:
    """The whole prompt, with one placeholder for the video."""
    text = prompt
    if placeholder not in prompt:
        content = [{"type": "video"}, {"type": "text", "text": prompt}]
        text = template.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    if text.count(placeholder) != 1:
        raise ValueError(
            f"prompt: expected the video placeholder {placeholder} once in the chat prompt, "
            f"got {text.count(placeholder)} in {text!r}"
        )
    return text


def _metadata(video: Video) -> dict[str, Any]:
    """What HF's processors know of a video that they sampled themselves."""
    height, width = video.source_size or video.frames.shape[1:3]
    return {
        "total_num_frames": round(video.duration * video.fps),
        "fps": video.fps,
        "duration": video.duration,
        "frames_indices": (video.timestamps * video.fps).round().long().tolist(),
        "height": height,
        "width": width,
    }
