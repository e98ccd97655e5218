"""What the figures of a page are drawn from: places on a canvas, worked out here, drawn there.

Canvases are narrow, so that their text can be read on a narrow page too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from lvspec.reporting.tokens import Caption
from lvspec.rule import GATE_BINS

WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 16, 40

_LOWEST = -16.0
"""Octaves: the gate's lowest bin begins at 2**-16, and the highest ends at 1."""


class Tick(NamedTuple):
    """A mark of an axis: where, and what stands there."""

    at: float
    text: str


class Bar(NamedTuple):
    """A bar: place and size, a class for its colour, and what it says."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str


class Point(NamedTuple):
    """A point: place, a class for its colour and form, a label, what it says, and where its label
    begins, or ends where `is_left`."""

    x: float
    y: float
    kind: str
    label: str
    title: str
    label_x: float = 0.0
    label_y: float = 0.0
    is_left: bool = False

    @property
    def is_far(self) -> bool:
        """Whether a line has to lead from its point to its label."""
        return bool(self.label) and self.label_y - self.y > 20


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        title: What it is, for those who cannot see it.
        x_label, y_label: Of the axes.
        x_ticks, y_ticks: Their marks.
        bars, points: What is drawn.
        line: Places that a line leads through.
        rule: A vertical line and its text.
    """

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bars: tuple[Bar, ...] = ()
    points: tuple[Point, ...] = ()
    line: tuple[tuple[float, float], ...] = ()
    rule: Tick | None = None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def _along(value: float, low: float, high: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)


def _up(value: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)


def round_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    found = []
    while (first + len(found)) * step <= high + 1e-9 * step:
        found.append((first + len(found)) * step)
    return found


def short(value: float) -> str:
    """A number in few characters: `0.065`, `12`, `1.5`."""
    if value != value or math.isinf(value):
        return str(value)
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.4f}".rstrip("0").rstrip(".")


def per_cent(value: float) -> str:
    text = f"{100 * value:.1f}"
    return f"{text.removesuffix('.0')} %"


def acceptance_chart(shares: Sequence[float], tau: float | None) -> Chart | None:
    """Of how many passes the first, second, ... drafted token was accepted."""
    if not shares:
        return None
    count = len(shares)
    slot = (WIDTH - LEFT - RIGHT) / count
    bars = tuple(
        Bar(
            LEFT + i * slot + slot * 0.12,
            _up(share, 0, 1),
            slot * 0.76,
            HEIGHT - BOTTOM - _up(share, 0, 1),
            "accepted",
            f"drafted token {i + 1}: accepted in {per_cent(share)} of the passes",
        )
        for i, share in enumerate(shares)
    )
    every = max(1, -(-count // 12))
    # The last one, and those at even distances that leave room for it.
    shown = [i for i in range(0, count, every) if count - 1 - i >= every] + [count - 1]
    told = "" if tau is None else f"; tau {tau:.2f}"
    return Chart(
        f"Share of passes that accepted the drafted token at each position{told}",
        "position in the draft",
        "accepted",
        tuple(Tick(LEFT + (i + 0.5) * slot, str(i + 1)) for i in shown),
        tuple(Tick(_up(x, 0, 1), per_cent(x)) for x in (0, 0.25, 0.5, 0.75, 1)),
        bars,
    )


def relevance_chart(captions: Sequence[Caption]) -> Chart | None:
    """How many rows have which relevance, in the bins of the gate, and where it parts them."""
    values, anchors = [], []
    for caption in captions:
        if caption.steps:
            for step in caption.steps:
                values += step.relevance or []
                anchors += [not x < step.anchor_threshold for x in step.relevance or []]
        else:
            known = [t for t in caption.tokens if t.relevance is not None]
            values += [t.relevance for t in known]
            anchors += [t.is_anchor for t in known]
    if not values:
        return None
    counts: dict[int, list[int]] = {}
    for value, is_anchor in zip(values, anchors):
        counts.setdefault(_bin(value), [0, 0])[is_anchor] += 1
    first, last = max(min(counts) - 1, 0), min(max(counts) + 1, GATE_BINS - 1)
    most = max(map(sum, counts.values()))
    slot = (WIDTH - LEFT - RIGHT) / (last + 1 - first)
    bars = []
    for index, (fillers, looked) in sorted(counts.items()):
        base, where = 0, f"relevance {short(_edge(index))} to {short(_edge(index + 1))}"
        for count, kind in ((fillers, "filler"), (looked, "anchor")):
            if count:
                y, end = _up(base + count, 0, most), _up(base, 0, most)
                x = LEFT + (index - first) * slot + slot * 0.08
                bars.append(Bar(x, y, slot * 0.84, end - y, kind, f"{where}: {count} {kind} rows"))
                base += count
    low, high = math.log2(_edge(first)), math.log2(_edge(last + 1))
    # A number at every second octave, or as many as there is room for.
    every = max(1, math.ceil((high - low) / 7))
    octaves = range(math.ceil(low), math.floor(high) + 1, every)
    rule = None
    threshold = _threshold(captions)
    if threshold is not None and _edge(first) <= threshold <= _edge(last + 1):
        at = _along(math.log2(threshold), low, high)
        rule = Tick(at, f"threshold {short(threshold)}")
    return Chart(
        "How many of the rows that were verified have which visual relevance",
        "visual relevance of a row (logarithmic)",
        "rows",
        tuple(Tick(_along(x, low, high), short(2.0**x)) for x in octaves),
        tuple(Tick(_up(x, 0, most), f"{x:g}") for x in round_ticks(0, most) if x == int(x)),
        tuple(bars),
        rule=rule,
    )


def _threshold(captions: Sequence[Caption]) -> float | None:
    """Of one caption, the last; of several, their middle one."""
    found = sorted(
        threshold
        for caption in captions
        if (threshold := caption.stats.get("anchor_threshold")) is not None and threshold > 0
    )
    return found[len(found) // 2] if found else None


def _edge(index: int) -> float:
    """The lower end of a bin: four an octave, of equal width between powers of two."""
    whole, part = divmod(index, 4)
    return 2.0 ** (_LOWEST + whole) * (1 + part / 4)


def _bin(value: float) -> int:
    if not value > 0:
        return 0
    whole = math.floor(math.log2(value))
    part = math.floor((value / 2.0**whole - 1) * 4)
    return min(max(int((whole - _LOWEST) * 4 + part), 0), GATE_BINS - 1)


def trade_chart(points: Sequence[tuple[float, float, str, str, str]], **labels: str) -> Chart:
    """What is gained against what is kept.

    Args:
        points: x, y (a share), class, label and title of each; those of the class "swept" are
            joined by a line, in their order.
        **labels: `title`, `x_label`, `y_label`.
    """
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_low, x_high = _widened(min(xs), max(xs), 0.12)
    y_low, y_high = _widened(min(ys), max(ys), 0.15)
    y_high = min(y_high, 1.0 + 0.08 * (1 - y_low) if y_low < 1 else 1.02)
    placed = tuple(
        Point(_along(x, x_low, x_high), _up(y, y_low, y_high), kind, label, title)
        for x, y, kind, label, title in points
    )
    return Chart(
        x_ticks=tuple(Tick(_along(x, x_low, x_high), short(x)) for x in round_ticks(x_low, x_high)),
        y_ticks=tuple(
            Tick(_up(y, y_low, y_high), per_cent(y))
            for y in round_ticks(y_low, y_high)
            if y <= 1 + 1e-9
        ),
        points=_labelled_apart(placed),
        line=tuple((p.x, p.y) for p in placed if p.kind == "swept"),
        **labels,
    )


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    room = share * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, high + room


_LETTER, _LINE = 6.4, 13.0
"""Room that a letter of a label takes, and a line of them."""


def _labelled_apart(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points with their labels where these stand on nothing else, beside them or below.

    One for which there is no such place has none. The first points choose first.
    """
    placed, taken = list(points), [(p.x - 6, p.y - 6, p.x + 6, p.y + 6) for p in points]

    def place(index: int, dy: float, is_left: bool, *, is_far: bool) -> bool:
        point = placed[index]
        x, y = point.x + (3 if is_far else -9 if is_left else 9), point.y + dy
        width = _LETTER * len(point.label)
        left = x - width if is_left else x
        boxes = [(left, y - 10, left + width, y - 10 + _LINE)]
        if is_far:  # a line leads down to it
            boxes.append((point.x - 1, point.y + 7, point.x + 1, y))
        others = taken[:index] + taken[index + 1 :]
        is_within = LEFT <= left and left + width <= WIDTH and 0 <= y - 10 and y < HEIGHT - BOTTOM
        if not is_within or any(_overlap(box, other) for box in boxes for other in others):
            return False
        taken.extend(boxes)
        placed[index] = point._replace(label_x=x, label_y=y, is_left=is_left)
        return True

    waiting = [
        index
        for index in range(len(points))
        if not any(
            place(index, *each, is_far=False) for each in product((-7, 15, 4), (False, True))
        )
    ]
    # From the right, so that what is further left goes further down and no line crosses a label.
    for index in sorted(waiting, key=lambda index: -points[index].x):
        if not any(place(index, dy, False, is_far=True) for dy in range(26, 120, 13)):
            placed[index] = points[index]._replace(label="")
    return tuple(placed)


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


PHASE_NAMES = ("prefill", "draft", "verify", "accept", "commit", "iteration")


def phases(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(name, seconds, share) of the phases that took time, warm-up left out."""
    found = [(name, seconds.get(name, 0.0)) for name in PHASE_NAMES]
    total = sum(value for _, value in found)
    return [(name, value, value / total) for name, value in found if value > 0]


@dataclass(frozen=True)
class Scale:
    """Relevance as the height of a bar: logarithmic, in whole octaves around what there is.

    Attributes:
        low, high: log2 of relevances with the heights 0 and 1.
    """

    low: float
    high: float

    @classmethod
    def of(cls, caption: Caption) -> Scale | None:
        """None where no token has a relevance above 0."""
        found = [t.relevance for t in caption.tokens if t.relevance]
        found = [math.log2(x) for x in found if x > 0]
        return cls(math.floor(min(found)) - 1.0, math.ceil(max(found) + 1e-9)) if found else None

    def height(self, relevance: float | None) -> float | None:
        """0 to 1."""
        if relevance is None or relevance != relevance:
            return None
        if relevance <= 0:
            return 0.0
        if math.isinf(relevance):
            return 1.0
        share = (math.log2(relevance) - self.low) / (self.high - self.low)
        return round(min(max(share, 0.0), 1.0), 3)
