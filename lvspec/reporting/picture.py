"""A picture to pass on: a caption in the colours of its page, or methods beside each other.

Drawn by matplotlib, with its own font and without a browser.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lvspec.reporting.caption_view import CaptionView
from lvspec.reporting.figures import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE, WELL = "#16191d", "#565e68", "#d9dde2", "#eceff2"
COLORS = {
    "exact": "#9aa3ad",
    "target": "#9aa3ad",
    "loose": "#e69f00",
    "shift": "#cc79a7",
    "bonus": "#0072b2",
    "rejected": "#d55e00",
    "anchor": "#009e73",
    "filler": "#9aa3ad",
    "accepted": "#0072b2",
}
"""Okabe and Ito's; kinds differ in their lines too."""

_LINES = {"exact": "-", "target": "-", "loose": (0, (1, 1)), "shift": (0, (4, 2)), "bonus": "-"}
_WIDTH = 11.0
_DPI = 150


def caption_picture(view: CaptionView) -> bytes:
    """A caption token by token, its two figures and its numbers, as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = _rows_of(view)
    height = 1.95 + 0.62 * len(rows) + (2.45 if _charts(view) else 0)
    figure = _figure(height)
    top = _head(figure, view, height)
    top = _words(figure, view, rows, top, height)
    charts = _charts(view)
    for index, chart in enumerate(charts):
        left = 0.075 + index * 0.49
        axes = figure.add_axes((left, 0.62 / height, 0.40, 1.75 / height))
        _draw(axes, chart)
    return _png(figure)


def chart_picture(chart: Chart, title: str) -> bytes:
    """One figure as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(5.4)
    figure.text(0.07, 0.93, title, fontsize=15, fontweight="bold", color=INK, parse_math=False)
    _draw(figure.add_axes((0.09, 0.13, 0.86, 0.72)), chart)
    return _png(figure)


def _figure(height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "png: expected matplotlib, which is not installed (pip install 'lvspec[report]')"
        ) from error
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that its font lacks, which are boxes then
        figure.savefig(file, format="png")
    return file.getvalue()


def _head(figure: Figure, view: CaptionView, height: float) -> float:
    """The title and the numbers; returns the inches from below that are left."""
    stats, counts = view.caption.stats, view.caption.counts
    parts = []
    if stats.get("tau") is not None:
        parts.append(f"tau {stats['tau']:.2f}")
    parts.append(f"{len(view.caption.tokens)} tokens")
    parts += [
        f"{counts[kind]} {kind}"
        for kind in ("exact", "loose", "shift", "bonus", "rejected")
        if kind in counts
    ]
    if stats.get("regret") is not None:
        parts.append(f"regret {stats['regret']:.2f} nats")
    left = 0.4 / _WIDTH
    options: dict[str, Any] = {"parse_math": False, "color": INK}
    name = view.name if len(view.name) <= 80 else f"{view.name[:77]}..."
    figure.text(left, 1 - 0.5 / height, name, fontsize=17, fontweight="bold", **options)
    options["color"] = SOFT
    figure.text(left, 1 - 0.82 / height, " · ".join(parts), fontsize=10, **options)
    x = left
    for kind in ("exact", "loose", "shift", "bonus"):
        _underlined(figure, x, 1 - 1.16 / height, kind, kind, 9.5, height)
        x += (_measure(figure, kind, 9.5) + 0.3) / _WIDTH
    told = "bold, bar above the line: the video decides"
    figure.text(x, 1 - 1.16 / height, told, fontsize=9.5, **options)
    return height - 1.62


def _measure(figure: Figure, text: str, size: float, weight: str = "normal") -> float:
    """Inches."""
    from matplotlib.font_manager import FontProperties

    renderer = figure.canvas.get_renderer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        width, _, _ = renderer.get_text_width_height_descent(
            text, FontProperties(size=size, weight=weight), False
        )
    return width / _DPI


def _shown(text: str, name: str) -> str:
    return text.strip() or ("↵" if "\n" in text else name.strip())


def _rows_of(view: CaptionView) -> list[list[tuple[Any, str, float, float]]]:
    """Lines of (token, text, left, width), in inches."""
    figure, rows, x = _figure(1.0), [[]], 0.4
    for word in view.words:
        placed = []
        for token in word:
            text = _shown(token.text, token.name)
            weight = "bold" if token.is_anchor else "normal"
            placed.append((token, text, _measure(figure, text, 12.5, weight) + 0.02))
        width = sum(each[2] for each in placed)
        if x + width > _WIDTH - 0.4 and rows[-1]:
            rows.append([])
            x = 0.4
        for token, text, own in placed:
            rows[-1].append((token, text, x, own))
            x += own
        x += 0.09
    return rows


def _words(figure: Figure, view: CaptionView, rows: Sequence, top: float, height: float) -> float:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    def box(x: float, y: float, width: float, tall: float, color: str) -> None:
        size = (width / _WIDTH, tall / height)
        place = (x / _WIDTH, y / height)
        figure.add_artist(Rectangle(place, *size, color=color, linewidth=0))

    for row in rows:
        for token, text, x, width in row:
            _underlined(
                figure,
                x / _WIDTH,
                top / height,
                text,
                token.kind,
                12.5,
                height,
                bold=token.is_anchor,
            )
            bar = view.height(token.relevance)
            if view.scale is not None:
                box(x, top - 0.33, width - 0.02, 0.2, WELL)
                if bar:
                    color = COLORS["anchor" if token.is_anchor else "filler"]
                    box(x, top - 0.33, width - 0.02, 0.2 * bar, color)
                line = view.height(token.threshold)
                if line is not None and 0 < line < 1:
                    at = (top - 0.33 + 0.2 * line) / height
                    ends = [x / _WIDTH, (x + width - 0.02) / _WIDTH]
                    figure.add_artist(
                        Line2D(ends, [at, at], color=INK, linewidth=0.7, linestyle=(0, (3, 2)))
                    )
        top -= 0.62
    return top


def _underlined(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    kind: str,
    size: float,
    height: float,
    *,
    bold: bool = False,
) -> None:
    from matplotlib.lines import Line2D

    weight = "bold" if bold else "normal"
    figure.text(x, y, text, fontsize=size, fontweight=weight, color=INK, parse_math=False)
    width = _measure(figure, text, size, weight) / _WIDTH
    color, style = COLORS[kind], _LINES[kind]
    for below in (0.06, 0.09) if kind == "bonus" else (0.06,):
        at = y - below / height
        thick = {"exact": 0.8, "target": 0.8, "bonus": 1.1}.get(kind, 2.2)
        figure.add_artist(
            Line2D([x, x + width], [at, at], color=color, linewidth=thick, linestyle=style)
        )


def _charts(view: CaptionView) -> list[Chart]:
    return [chart for chart in (view.acceptance, view.relevance) if chart is not None]


def _draw(axes: Axes, chart: Chart) -> None:
    """A figure of the page, on its own canvas."""
    from matplotlib.patches import Rectangle

    axes.set_xlim(chart.left, chart.right, auto=False)
    axes.set_ylim(chart.bottom, chart.top - 8, auto=False)
    for bar in chart.bars:
        place = (bar.x, bar.y)
        axes.add_patch(Rectangle(place, bar.width, bar.height, color=COLORS[bar.kind], linewidth=0))
    if chart.rule is not None:
        axes.axvline(chart.rule.at, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(chart.rule.at + 5, chart.top, chart.rule.text, fontsize=8, color=INK, va="top")
    if chart.line:
        axes.plot(*zip(*chart.line), color=COLORS["filler"], linewidth=1.2, zorder=1)
    for point in chart.points:
        is_ours = point.kind in ("chosen", "ours")
        axes.plot(
            *(point.x, point.y),
            marker="D" if is_ours else "s" if point.kind == "reference" else "o",
            color=COLORS["loose" if is_ours else "bonus"],
            markeredgecolor=INK,
            markersize=9,
            clip_on=False,
        )
        if point.is_far:
            ends = [point.x, point.x], [point.y + 6, point.label_y]
            axes.plot(*ends, color=SOFT, linewidth=0.7)
        if point.label:
            axes.text(
                *(point.label_x, point.label_y, point.label),
                fontsize=9,
                fontweight="bold" if is_ours else "normal",
                ha="right" if point.is_left else "left",
                parse_math=False,
            )
    axes.set_xticks([t.at for t in chart.x_ticks], [t.text for t in chart.x_ticks], fontsize=8)
    axes.set_yticks([t.at for t in chart.y_ticks], [t.text for t in chart.y_ticks], fontsize=8)
    axes.set_xlabel(chart.x_label, fontsize=9, color=SOFT)
    axes.set_ylabel(chart.y_label, fontsize=9, color=SOFT)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=SOFT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
