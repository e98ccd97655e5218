"""Scenes of one to three shapes in clips of several lengths and sizes, and which are held out.

Shapes, colours and backgrounds are those of `lvspec.shapes.scenes`. What differs: up to three
shapes, all of different colours; shapes move in steps of one patch per pair of frames and may rest
between; and a shape that has turned shows a dot, so that a single pair of frames says that what is
seen is the second direction. A scene belongs to a split by a hash of its *description*: what there
is to say about it, never positions, timing or the format of the clip.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from lvspec.shapes.scenes import BACKGROUNDS, COLORS, DIRECTIONS, KINDS, SIZES, SPLITS, different

PATCH = 14  # pixels
PAIR = 2  # frames of one temporal patch
FPS = 2  # frames per second of a clip
MAX_SHAPES = 3
# Shapes are described in this order, which the colours alone decide.
COLOR_ORDER = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")


@dataclass(frozen=True)
class Format:
    """Length and size of a clip."""

    frames: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches in time, height and width."""
        return self.frames // PAIR, self.height // PATCH, self.width // PATCH

    @property
    def video_tokens(self) -> int:
        pairs, rows, columns = self.grid
        return pairs * rows * columns // 4


# 36, 72, 160 and 320 video tokens.
FORMATS = (
    Format(8, 84, 84),
    Format(16, 84, 84),
    Format(16, 112, 140),
    Format(32, 112, 140),
)


@dataclass(frozen=True)
class Shape:
    """One shape. `turn` is the second direction, or None if the course never changes.

    `start` is the top left corner (x, y) in pixels, multiples of a patch; `moving` says for each
    pair of frames whether the shape moves by a patch in it or rests.
    """

    size: str
    color: str
    kind: str
    direction: str
    turn: str | None
    start: tuple[int, int]
    moving: tuple[bool, ...]

    @property
    def half(self) -> int:
        """The pair of frames from which a turn holds."""
        return len(self.moving) // 2

    def heading(self, pair: int) -> str:
        return self.turn if self.turn and pair >= self.half else self.direction

    def turned(self, pair: int) -> bool:
        return self.turn is not None and pair >= self.half

    def corners(self) -> list[tuple[int, int]]:
        """Top left corner in each frame."""
        x, y = self.start
        found = []
        for pair, moves in enumerate(self.moving):
            dx, dy = DIRECTIONS[self.heading(pair)]
            step = PATCH // PAIR if moves else 0
            for _ in range(PAIR):
                found.append((x, y))
                x, y = x + step * dx, y + step * dy
        return found

    @property
    def description(self) -> str:
        return f"{self.size} {self.color} {self.kind} {self.direction}>{self.turn or 'none'}"


@dataclass(frozen=True)
class Scene:
    """What a clip shows. `shapes` are in the order of their colours."""

    background: str
    shapes: tuple[Shape, ...]
    format: Format

    @property
    def description(self) -> str:
        """All attributes, nothing else: what the held-out split is made by."""
        return " | ".join([self.background, *(shape.description for shape in self.shapes)])

    @property
    def split(self) -> str:
        """`evaluation` and `calibration` are a tenth of all descriptions each."""
        bucket = hashlib.sha256(self.description.encode()).digest()[0] % 10
        return SPLITS[min(bucket, 2)]


def _random_course(rng: random.Random, pairs: int) -> tuple[bool, ...]:
    moving = [False] * pairs
    for first, last in ((0, pairs // 2), (pairs // 2, pairs)):
        length = last - first
        steps = min(length, rng.choice((2, 2, 3)))
        for pair in rng.sample(range(first, last), steps):
            moving[pair] = True
    return tuple(moving)


def _random_shape(rng: random.Random, color: str, clip: Format) -> Shape:
    direction = rng.choice(list(DIRECTIONS))
    turn = rng.choice([d for d in DIRECTIONS if d != direction]) if rng.random() < 0.5 else None
    pairs, rows, columns = clip.grid
    return Shape(
        size=rng.choice(list(SIZES)),
        color=color,
        kind=rng.choice(KINDS),
        direction=direction,
        turn=turn,
        start=(PATCH * rng.randrange(columns), PATCH * rng.randrange(rows)),
        moving=_random_course(rng, pairs),
    )


def _inside(shape: Shape, corners: list[tuple[int, int]], clip: Format) -> bool:
    size = SIZES[shape.size]
    x, y = zip(*corners)
    # The last step is not in a frame, but a patch is covered by what moves through it.
    return (
        min(x) >= 0
        and min(y) >= 0
        and max(x) + size + PATCH // PAIR <= clip.width
        and max(y) + size + PATCH // PAIR <= clip.height
    )


def _apart(
    first: Shape, firsts: list[tuple[int, int]], second: Shape, seconds: list[tuple[int, int]]
) -> bool:
    """The shapes never overlap."""
    size0, size1 = SIZES[first.size], SIZES[second.size]
    for (x0, y0), (x1, y1) in zip(firsts, seconds):
        if x0 < x1 + size1 and x1 < x0 + size0 and y0 < y1 + size1 and y1 < y0 + size0:
            return False
    return True


def _place(rng: random.Random, colors: list[str], clip: Format) -> list[Shape] | None:
    """Shapes of these colours that stay in the frame and apart, or None if it did not work out."""
    placed: list[tuple[Shape, list[tuple[int, int]]]] = []
    for color in colors:
        for _ in range(40):
            shape = _random_shape(rng, color, clip)
            corners = shape.corners()
            if _inside(shape, corners, clip) and all(
                _apart(shape, corners, other, others) for other, others in placed
            ):
                placed.append((shape, corners))
                break
        else:
            return None
    return [shape for shape, _ in placed]


def random_scene(rng: random.Random, split: str | None = None, clip: Format = FORMATS[0]) -> Scene:
    """A scene drawn from `rng`, of the given split (any split if None).

    Raises:
        ValueError: if `split` is none of `SPLITS`.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    while True:
        count = rng.randint(1, MAX_SHAPES)
        colors = rng.sample(list(COLORS), count)
        shapes = _place(rng, colors, clip)
        if shapes is None:
            continue
        shapes.sort(key=lambda shape: COLOR_ORDER.index(shape.color))
        scene = Scene(rng.choice(list(BACKGROUNDS)), tuple(shapes), clip)
        if split is None or scene.split == split:
            return scene


def scenes(split: str, count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes of a split, all formats in turn, the same ones for the same seed.

    Their descriptions differ.

    Raises:
        ValueError: `split` is none of `SPLITS`, or has fewer.
    """
    rng = random.Random(f"real-{split}-{seed}")
    return different(
        split, count, lambda drawn: random_scene(rng, split, FORMATS[drawn % len(FORMATS)])
    )
