"""Where things stand in figures."""

import math
from itertools import combinations

import captions
import pytest
import torch

from lvspec.reference.gate import _histogram
from lvspec.reporting.figures import (
    HEIGHT,
    LEFT,
    WIDTH,
    Scale,
    _bin,
    _edge,
    acceptance_chart,
    per_cent,
    phases,
    relevance_chart,
    round_ticks,
    short,
    trade_chart,
)
from lvspec.reporting.tokens import read_caption


@pytest.fixture
def caption():
    return read_caption(captions.result(), "here")


def test_bins_are_those_of_the_gate():
    values = torch.cat([torch.logspace(-5.5, 0.2, 400), torch.tensor([0.0, -1.0, 5 / 256])])
    counts = _histogram(values[None], torch.tensor([len(values)], dtype=torch.int32))[0]
    found = torch.zeros(64, dtype=torch.int32)
    for value in values.tolist():
        found[_bin(value)] += 1
    assert found.equal(counts)
    assert _edge(40) == 1 / 64 and _edge(41) == 5 / 256


def test_rows_are_counted_as_they_were_judged(caption):
    chart = relevance_chart([caption])
    told = [bar.title for bar in chart.bars]
    rows = sum(len(step.relevance) for step in captions.STEPS)
    assert sum(int(title.split(": ")[1].split()[0]) for title in told) == rows
    assert sum("anchor" in title for title in told) == 2
    assert chart.rule.text == "threshold 0.06"
    below, above = (
        [bar.x for bar in chart.bars if bar.kind == kind] for kind in ("filler", "anchor")
    )
    assert max(below) < chart.rule.at < min(above)


def test_shares_are_heights():
    chart = acceptance_chart([1.0, 0.5, 0.0], 2.5)
    heights = [bar.height for bar in chart.bars]
    assert heights[1] == pytest.approx(heights[0] / 2) and heights[2] == 0
    assert chart.title.endswith("tau 2.50")
    long = acceptance_chart([0.5] * 63, None)
    assert len(long.x_ticks) < 13 and long.x_ticks[-1].text == "63"
    assert acceptance_chart([], None) is None


@pytest.mark.parametrize(
    "low, high, ticks",
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0.9, 11, [5, 10]), (3, 3, [3])],
)
def test_ticks_are_round(low, high, ticks):
    assert round_ticks(low, high) == pytest.approx(ticks)


def test_labels_do_not_stand_on_each_other():
    names = ["autoregression", "hf-generate", "hf-assisted", "strict", "specvlm", "fly", "lvspec"]
    speeds = [1.0, 0.4, 0.26, 0.92, 0.85, 1.2, 3.3]
    points = [(x, 1.0, "method", name, name) for x, name in zip(speeds, names)]
    chart = trade_chart(points, title="", x_label="", y_label="")
    assert [point.label for point in chart.points] == names
    boxes = []
    for point in chart.points:
        width = 6.4 * len(point.label)
        left = point.label_x - width if point.is_left else point.label_x
        boxes.append((left, point.label_y - 10, left + width, point.label_y + 3))
        assert LEFT <= left and left + width <= WIDTH and point.label_y < HEIGHT
    for one, other in combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)


def test_one_point_is_enough_for_a_figure():
    (point,) = trade_chart([(2.0, 1.0, "ours", "a", "a")], title="", x_label="", y_label="").points
    assert LEFT < point.x < WIDTH and 0 < point.y < HEIGHT


def test_heights_of_bars_are_logarithmic(caption):
    scale = Scale.of(caption)
    heights = [scale.height(x) for x in (0.01, 0.02, 0.04, 0.08)]
    assert all(0 < height < 1 for height in heights)
    steps = [after - before for before, after in zip(heights, heights[1:])]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.002)
    assert (scale.height(0.0), scale.height(math.inf), scale.height(None)) == (0.0, 1.0, None)
    alone = read_caption(captions.result(relevance=None), "here")
    assert Scale.of(alone) is None


def test_numbers_are_short():
    assert [short(x) for x in (0.0625, 12.0, 1e-5, math.inf)] == ["0.0625", "12", "0", "inf"]
    assert [per_cent(x) for x in (1.0, 0.5, 0.1234)] == ["100 %", "50 %", "12.3 %"]
    found = phases({"prefill": 1.0, "draft": 3.0, "verify": 0.0, "warm-up": 9.0})
    assert found == [("prefill", 1.0, 0.25), ("draft", 3.0, 0.75)]
