"""HF's own resizing, one frame at a time instead of the whole video at once.

A video processor of HF's resizes the stack of all frames first of all, to a size that follows from
height, width and number of frames. What it would do is asked of it with frames that have no memory;
then each frame can go through the same method as soon as it is decoded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lvspec.video.files import Resize

if TYPE_CHECKING:
    from transformers import BaseVideoProcessor


def frame_resize(video_processor: BaseVideoProcessor) -> Resize:
    """The resizing of a video processor, for single frames of a longer video.

    Frames that went through it are to be given to the processor with `do_resize=False`. Where the
    processor is set not to resize, they stay as they are.
    """

    return _FrameResize(video_processor)


class _FrameResize:
    """See `frame_resize`; other processes may be given it."""

    def __init__(self, video_processor: BaseVideoProcessor) -> None:
        self._processor = video_processor
        self._known: tuple[tuple[int, ...], Callable[[Tensor], Tensor]] | None = None

    def __reduce__(self) -> tuple[type[_FrameResize], tuple[BaseVideoProcessor]]:
        return _FrameResize, (self._processor,)

    def __call__(self, frames: Tensor, num_frames: int) -> Tensor:
        size, known = (num_frames, *frames.shape[1:3]), self._known
        if known is None or known[0] != size:
            known = self._known = size, _method(self._processor, *size)
        channels_first = frames.permute(0, 3, 1, 2)[None]
        resized = [known[1](frame)[0] for frame in channels_first.split(1, dim=1)]
        return torch.cat(resized).permute(0, 2, 3, 1)


class _Asked(Exception):
    """Leaves HF's code as soon as frames have their size."""


def _method(
    video_processor: BaseVideoProcessor, num_frames: int, height: int, width: int
) -> Callable[[Tensor], Tensor]:
    """What takes one frame `[1, 1, 3, H, W]` to `[1, 1, 3, H', W']`.

    Raises:
        ValueError: HF's code refuses the size, or resizes in a way that is not known here.
    """
    from transformers.video_processing_utils import BaseVideoProcessor

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    result = None

    class Resizing(BaseVideoProcessor):
        """Stands below the processor's own class, whose `resize` has chosen the size by then."""

        def resize(self, image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal result
            calls.append((args, kwargs))
            result = super().resize(image, *args, **kwargs)
            return result

    class Asked(type(video_processor), Resizing):
        def resize(self, *args: Any, **kwargs: Any) -> None:
            if super().resize(*args, **kwargs) is not result:
                raise ValueError(
                    f"video processor: expected one that resizes as HF's others do, got "
                    f"{type(video_processor).__name__}; lvspec.video.read_video reads frames for it"
                )
            raise _Asked

    asked = copy.copy(video_processor)
    asked.__class__ = Asked  # of this copy; the processor itself stays as it is
    weightless = torch.empty(num_frames, 3, height, width, dtype=torch.uint8, device="meta")
    try:
        asked(
            [weightless],
            do_sample_frames=False,
            input_data_format="channels_first",
            return_tensors="pt",
        )
    except _Asked:
        pass

    def method(frame: Tensor) -> Tensor:
        for args, kwargs in calls:
            frame = BaseVideoProcessor.resize(video_processor, frame, *args, **kwargs)
        return frame

    return method
