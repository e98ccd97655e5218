"""Which way up a frame is meant to be shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import av


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways to lay a picture on the lattice of its pixels.

    Attributes:
        transposed: Rows become columns, before anything is flipped.
        flip_rows: The first row becomes the last.
        flip_columns: The first column becomes the last.
    """

    transposed: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, pixels: Tensor) -> Tensor:
        """uint8 `[H, W, 3]` as stored to `[H, W, 3]`, or `[W, H, 3]`, as shown."""
        if self.transposed:
            pixels = pixels.transpose(0, 1)
        axes = [axis for axis, flip in enumerate((self.flip_rows, self.flip_columns)) if flip]
        return pixels.flip(axes) if axes else pixels


def orientation_after(frame: av.VideoFrame, before: Orientation) -> Orientation:
    """The orientation of a frame that follows one of orientation `before`.

    A container's matrix is on every frame. One inside the stream (H.264, HEVC) is on the frame
    where it begins and holds up to the next key frame; FFmpeg leaves that to the reader.
    """
    from av.sidedata.sidedata import SideDataContainer, Type

    # `frame.side_data` would hold the frame in a circle, whose memory comes back late.
    matrix = SideDataContainer(frame).get(Type.DISPLAYMATRIX)
    if matrix is None:
        return Orientation() if frame.key_frame else before
    # (column, row) as shown = (a * column + c * row, b * column + d * row), in 16.16 fixed point.
    a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].astype(np.int64).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(transposed=True, flip_rows=b < 0, flip_columns=c < 0)
    return Orientation(flip_rows=d < 0, flip_columns=a < 0)
