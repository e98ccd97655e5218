"""Plots of measured rows: speed-up against tau, and share of the bandwidth against context.

Needs matplotlib (`pip install 'lvspec[bench]'`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_plots(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """PNG files of what was measured; none where nothing was.

    Args:
        rows: Rows of `e2e.py`, each with its `device`.
        folder: Where they go; made if need be.

    Raises:
        ImportError: There is something to plot, and matplotlib is not here.
    """
    measured = [row for row in rows if "speedup" in row]
    if not measured:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots: expected matplotlib, pip install matplotlib") from None
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in (("speedup", _speedup), ("bandwidth", _bandwidth)):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        draw(figure.subplots(), measured)
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=120, metadata={"Software": None})
    return written


def _speedup(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Lines through the origin: tau is what they multiply."""
    chosen = [row for row in rows if row["batch"] == 1 and row["context"] == 16384] or rows
    for row in chosen:
        taus = [1, row["gamma"] + 1]
        ours, alone = row["methods"]["lvspec"], row["methods"]["autoregression"]
        (line,) = axes.plot(
            taus,
            [tau * alone["wall_ms"] / ours["wall_ms"] for tau in taus],
            label=f"{row['label']}, {row['context']} tokens, {row['device']}",
        )
        best = alone["limit_ms"] / ours["limit_ms"]
        color = line.get_color()
        axes.plot(taus, [tau * best for tau in taus], color=color, linestyle="--", linewidth=1)
        axes.plot([row["tau"]], [row["speedup"]], "o", color=color)
    axes.set_xlabel("tau, tokens per pass of the target (dots: as replayed; dashed: byte limit)")
    axes.set_ylabel("speed-up over our captured autoregression")
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.legend(fontsize="x-small")


def _bandwidth(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for label, device in dict.fromkeys((row["label"], row["device"]) for row in rows):
        mine = [r for r in rows if (r["label"], r["device"], r["batch"]) == (label, device, 1)]
        mine.sort(key=lambda row: row["context"])
        for method, style in (("lvspec", "o-"), ("autoregression", "x:")):
            points = [(row["context"], row["methods"][method]["share_of_limit"]) for row in mine]
            if points:
                axes.plot(*zip(*points), style, label=f"{label}, {method}, {device}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("context, tokens (batch 1)")
    axes.set_ylabel("byte limit / measured")
    axes.legend(fontsize="x-small")
