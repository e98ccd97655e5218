"""Scenes of two shapes, one round and one angular, that may be shown between two descriptions.

Which of the two is meant is plain from its kind, so nothing depends on order or place. An attribute
may be *blended*: a colour between two, a shape between two, a course of steps in two directions.
The nearer of the two is the truth. A training caption says the other as often as the clip shows it,
so who learns from such captions is unsure where the clip is between.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace

from lvspec.shapes.scenes import DIRECTIONS, PATIENCE, SPLITS, different
from lvspec.shapes.world import TEMPORAL

ROLES = 2  # the round shape, then the angular one
WEIGHTS = (0.25, 0.5)  # of the smaller part of a blend: least and most


@dataclass(frozen=True)
class Setting:
    """What a world's scenes are made of.

    Attributes:
        num_frames, height, width, patch: As of `lvspec.shapes.world.World`.
        backgrounds, colors: Names to RGB. Neighbours in this order may be blended.
        kinds: Names of the round shapes, and of the angular ones, to figures of
            `lvspec.shapes.clips.coverage`.
        sizes: Names to pixels, multiples of a patch.
        directions: Names to those of `lvspec.shapes.scenes.DIRECTIONS`.
        steps: Patches that a shape moves in a clip.
        blended: The share of attributes, sizes excepted, that are blended.
    """

    num_frames: int
    height: int
    width: int
    patch: int
    backgrounds: dict[str, tuple[int, int, int]]
    colors: dict[str, tuple[int, int, int]]
    kinds: tuple[dict[str, str], dict[str, str]]
    sizes: dict[str, int]
    directions: dict[str, str]
    steps: int
    blended: float = 0.0

    @property
    def num_pairs(self) -> int:
        """Frames in twos, as one patch holds them."""
        return self.num_frames // TEMPORAL

    @property
    def values(self) -> dict[str, list[str]]:
        """Every attribute's values, in the order of `patch_labels`."""
        kinds = [kind for role in self.kinds for kind in role]
        return {
            "color": list(self.colors),
            "kind": kinds,
            "size": list(self.sizes),
            "direction": list(self.directions),
            "background": list(self.backgrounds),
        }

    def move(self, direction: str) -> tuple[int, int]:
        """(dx, dy) of a named direction."""
        return DIRECTIONS[self.directions[direction]]


@dataclass(frozen=True)
class Blend:
    """An attribute as it is shown: `value`, and `other` with a weight below one half."""

    value: str
    other: str
    weight: float = 0.0


@dataclass(frozen=True)
class Shape:
    """One shape. `headings` is its direction in each pair of frames, None while it rests."""

    size: str
    color: Blend
    kind: Blend
    direction: Blend
    start: tuple[int, int]  # top left corner in pixels, multiples of a patch
    headings: tuple[str | None, ...]

    def corners(self, setting: Setting) -> list[tuple[int, int]]:
        """Top left corner in each frame, half a patch apart while it moves."""
        x, y = self.start
        found = []
        for heading in self.headings:
            dx, dy = (0, 0) if heading is None else setting.move(heading)
            for frame in range(TEMPORAL):
                half = setting.patch * frame // TEMPORAL
                found.append((x + half * dx, y + half * dy))
            x, y = x + setting.patch * dx, y + setting.patch * dy
        return found


@dataclass(frozen=True)
class Scene:
    """What a clip shows, the round shape first. `said` is what a caption of it says."""

    background: Blend
    shapes: tuple[Shape, Shape]
    said: tuple[tuple[str, str], ...]

    def blends(self) -> list[tuple[str, Blend]]:
        """Name and blend of every attribute, in the order of a caption."""
        found = [("background", self.background)]
        for index, shape in enumerate(self.shapes):
            found += [
                (f"size{index}", Blend(shape.size, shape.size)),
                (f"color{index}", shape.color),
                (f"kind{index}", shape.kind),
                (f"direction{index}", shape.direction),
            ]
        return found

    def attributes(self) -> list[tuple[str, str]]:
        """(name, value) of what is true of the clip."""
        return [(name, blend.value) for name, blend in self.blends()]

    @property
    def description(self) -> str:
        """All true attributes, nothing else: what the held-out split is made by."""
        return describe(self.attributes())


def describe(attributes: list[tuple[str, str]]) -> str:
    return " ".join(value for _, value in attributes)


def split_of(description: str) -> str:
    """`evaluation` and `calibration` are a tenth of all descriptions each."""
    bucket = hashlib.sha256(description.encode()).digest()[0] % 10
    return SPLITS[min(bucket, 2)]


def _blend(rng: random.Random, setting: Setting, values: list[str]) -> Blend:
    place = rng.randrange(len(values))
    neighbours = [p for p in (place - 1, place + 1) if 0 <= p < len(values)]
    weight = rng.uniform(*WEIGHTS) if rng.random() < setting.blended else 0.0
    return Blend(values[place], values[rng.choice(neighbours)], weight)


def _course(rng: random.Random, setting: Setting) -> tuple[Blend, tuple[str | None, ...]]:
    """A direction, and the steps that show it."""
    value = rng.choice(list(setting.directions))
    across = [d for d in setting.directions if _apart_ways(setting, d, value)]
    other = rng.choice(across)
    most = (setting.steps - 1) // 2
    astray = rng.randint(min(1, most), most) if rng.random() < setting.blended else 0
    steps = [other] * astray + [value] * (setting.steps - astray)
    rng.shuffle(steps)
    moving = sorted(rng.sample(range(setting.num_pairs), setting.steps))
    headings: list[str | None] = [None] * setting.num_pairs
    for pair, step in zip(moving, steps, strict=True):
        headings[pair] = step
    return Blend(value, other, astray / setting.steps), tuple(headings)


def _apart_ways(setting: Setting, first: str, second: str) -> bool:
    """Whether the directions are at right angles."""
    (x0, y0), (x1, y1) = setting.move(first), setting.move(second)
    return x0 * x1 + y0 * y1 == 0


def _random_shape(rng: random.Random, setting: Setting, role: int) -> Shape:
    direction, headings = _course(rng, setting)
    shape = Shape(
        size=rng.choice(list(setting.sizes)),
        color=_blend(rng, setting, list(setting.colors)),
        kind=_blend(rng, setting, list(setting.kinds[role])),
        direction=direction,
        start=(0, 0),
        headings=headings,
    )
    size, patch = setting.sizes[shape.size], setting.patch
    course = zip(*shape.corners(setting), strict=True)
    start = tuple(
        patch * rng.randint(-(min(places) // patch), (whole - size - max(places)) // patch)
        for places, whole in zip(course, (setting.width, setting.height), strict=True)
    )
    return replace(shape, start=start)


def _apart(shapes: tuple[Shape, Shape], setting: Setting) -> bool:
    """The shapes never overlap."""
    corners = [shape.corners(setting) for shape in shapes]
    sizes = [setting.sizes[shape.size] for shape in shapes]
    for (x0, y0), (x1, y1) in zip(*corners, strict=True):
        if x0 < x1 + sizes[1] and x1 < x0 + sizes[0] and y0 < y1 + sizes[1] and y1 < y0 + sizes[0]:
            return False
    return True


def random_scene(rng: random.Random, setting: Setting, split: str) -> Scene:
    """A scene of a split. What is said of training scenes is drawn; of others it is the truth.

    Raises:
        ValueError: if `split` is none of `SPLITS`, or the setting has none of it.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    for _ in range(PATIENCE):
        shapes = tuple(_random_shape(rng, setting, role) for role in range(ROLES))
        if not _apart(shapes, setting):
            continue
        scene = Scene(_blend(rng, setting, list(setting.backgrounds)), shapes, ())
        said = [
            (name, blend.other if split == "training" and rng.random() < blend.weight else value)
            for (name, value), (_, blend) in zip(scene.attributes(), scene.blends(), strict=True)
        ]
        # A caption is held out too, so that no held-out description was ever read.
        if split_of(scene.description) == split == split_of(describe(said)):
            return Scene(scene.background, shapes, tuple(said))
    raise ValueError(
        f"setting: expected one that has scenes of split {split!r}, got none in {PATIENCE} draws"
    )


def scenes(setting: Setting, split: str, count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes of a split with different descriptions, the same ones for the same seed.

    Raises:
        ValueError: `split` is none of `SPLITS`, or the setting has fewer of it.
    """
    rng = random.Random(f"{split}-{seed}")
    return different(split, count, lambda _: random_scene(rng, setting, split))
