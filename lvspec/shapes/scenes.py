"""Scenes of moving shapes: what there is to see in a clip, and which scenes are held out.

A scene holds one or two shapes on a plain background. Every shape has a size, a colour, a kind, a
direction of motion and, possibly, one turn half way. These attributes are the *anchors* of the
caption: only the video decides them. Scenes are assigned to a split by a hash of their
*description* (all attributes of the scene, nothing else), so a held-out scene differs from every
training scene in what there is to say about it, not merely in its noise or position.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "green": (25, 150, 50),
    "blue": (30, 70, 220),
    "yellow": (250, 225, 40),
    "purple": (135, 35, 165),
    "orange": (255, 135, 15),
    "pink": (255, 140, 190),
    "cyan": (40, 210, 225),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 240),
    "black": (18, 18, 18),
    "gray": (125, 125, 125),
    "brown": (95, 62, 35),
}
KINDS = ("circle", "square", "triangle", "cross", "ring")
SIZES: dict[str, int] = {"small": 14, "large": 28}  # pixels at FRAME_SIZE
DIRECTIONS: dict[str, tuple[int, int]] = {  # (dx, dy) per step
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
}
COUNTS = {1: "one", 2: "two"}

FRAME_SIZE = 84  # pixels; six patches of 14
NUM_FRAMES = 8  # frames that the model sees
STEP = 7  # pixels per seen frame: half a patch, so that motion stays on the patch lattice
TURN_FRAME = 4  # the seen frame at which a turn happens
LAST_TIME = 7.75  # a clip of 32 written frames, four per seen frame, ends here

SPLITS = ("evaluation", "calibration", "training")
PATIENCE = 5000  # draws in a row without a new description, after which there is none


@dataclass(frozen=True)
class Shape:
    """One moving shape. `turn` is the second direction, or None if the course never changes."""

    size: str
    color: str
    kind: str
    direction: str
    turn: str | None
    start: tuple[int, int]  # top left corner in pixels at FRAME_SIZE, multiples of a patch

    def position(self, time: float) -> tuple[float, float]:
        """Top left corner in pixels at FRAME_SIZE, `time` in seen frames from the start."""
        first = min(time, TURN_FRAME) if self.turn else time
        dx, dy = DIRECTIONS[self.direction]
        x, y = self.start[0] + STEP * first * dx, self.start[1] + STEP * first * dy
        if self.turn and time > TURN_FRAME:
            dx, dy = DIRECTIONS[self.turn]
            x, y = x + STEP * (time - TURN_FRAME) * dx, y + STEP * (time - TURN_FRAME) * dy
        return x, y

    @property
    def description(self) -> str:
        return f"{self.size} {self.color} {self.kind} {self.direction}>{self.turn or 'none'}"


@dataclass(frozen=True)
class Scene:
    """What a clip shows. `shapes` are ordered from left to right as they stand at the start."""

    background: str
    shapes: tuple[Shape, ...]

    @property
    def description(self) -> str:
        """All attributes, no positions: what the held-out split is made by."""
        return " | ".join([self.background, *(shape.description for shape in self.shapes)])

    @property
    def split(self) -> str:
        """`evaluation` and `calibration` are a tenth of all descriptions each."""
        bucket = hashlib.sha256(self.description.encode()).digest()[0] % 10
        return SPLITS[min(bucket, 2)]

    def attributes(self) -> list[tuple[str, str]]:
        """(name, value) of everything the video decides, in the order of the caption."""
        found = [("count", COUNTS[len(self.shapes)]), ("background", self.background)]
        for index, shape in enumerate(self.shapes):
            found += [
                (f"size{index}", shape.size),
                (f"color{index}", shape.color),
                (f"kind{index}", shape.kind),
                (f"direction{index}", shape.direction),
                (f"turn{index}", shape.turn or "none"),
            ]
        return found


def _random_shape(rng: random.Random) -> Shape:
    direction = rng.choice(list(DIRECTIONS))
    turn = rng.choice([d for d in DIRECTIONS if d != direction]) if rng.random() < 0.5 else None
    patches = FRAME_SIZE // 14
    return Shape(
        size=rng.choice(list(SIZES)),
        color=rng.choice(list(COLORS)),
        kind=rng.choice(KINDS),
        direction=direction,
        turn=turn,
        start=(14 * rng.randrange(patches), 14 * rng.randrange(patches)),
    )


def _inside(shape: Shape) -> bool:
    limit = FRAME_SIZE - SIZES[shape.size]
    corners = [shape.position(time) for time in (0, TURN_FRAME, LAST_TIME)]
    return all(0 <= value <= limit for corner in corners for value in corner)


def _apart(first: Shape, second: Shape) -> bool:
    """The shapes never overlap, and which one is further left at the start is plain."""
    if second.start[0] - first.start[0] < 14:
        return False
    for half_step in range(2 * NUM_FRAMES):
        time = half_step / 2
        (x0, y0), (x1, y1) = first.position(time), second.position(time)
        size0, size1 = SIZES[first.size], SIZES[second.size]
        if x0 < x1 + size1 and x1 < x0 + size0 and y0 < y1 + size1 and y1 < y0 + size0:
            return False
    return True


def random_scene(rng: random.Random, split: str | None = None) -> Scene:
    """A scene drawn from `rng`, of the given split (any split if None).

    Raises:
        ValueError: if `split` is none of `SPLITS`.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    count = 1 if rng.random() < 0.4 else 2
    while True:
        shapes = [_random_shape(rng) for _ in range(count)]
        if not all(_inside(shape) for shape in shapes):
            continue
        if len(shapes) == 2 and not _apart(*shapes):
            continue
        scene = Scene(background=rng.choice(list(BACKGROUNDS)), shapes=tuple(shapes))
        if split is None or scene.split == split:
            return scene


def different(split: str, count: int, draw: Callable[[int], Any]) -> list[Any]:
    """`count` scenes of a split with different descriptions.

    Args:
        split: Named in the error.
        count: How many.
        draw: One, from how many there are so far.

    Raises:
        ValueError: There are fewer: `PATIENCE` draws in a row brought no new one.
    """
    found: dict[str, Any] = {}
    missed = 0
    while len(found) < count:
        if missed == PATIENCE:
            raise ValueError(
                f"count: expected at most the {len(found)} scenes of different descriptions that "
                f"{PATIENCE} draws in a row had nothing to add to in split {split!r}, got {count}"
            )
        scene = draw(len(found))
        missed = missed + 1 if scene.description in found else 0
        found.setdefault(scene.description, scene)
    return list(found.values())


def scenes(split: str, count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes of a split with different descriptions, the same ones for the same seed.

    Raises:
        ValueError: `split` is none of `SPLITS`, or has fewer.
    """
    rng = random.Random(f"{split}-{seed}")
    return different(split, count, lambda _: random_scene(rng, split))
