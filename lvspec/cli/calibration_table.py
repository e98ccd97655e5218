"""The table of a calibration: candidates, what was expected of them and what they did."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table

from lvspec.calibration.calibrate import Calibration

HEADINGS = ("gamma", "tau", "decode", "caption", "kept", "least", "regret")


def print_table(calibration: Calibration) -> None:
    """Print it: a line of what was predicted, and below it what was measured."""
    fidelity = calibration.profile.fidelity
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.title = (
        f"{fidelity['metric']}: {fidelity['stated']:g} with confidence {fidelity['confidence']:g}"
    )
    table.add_column("settings")  # which wraps where a line has eighty columns
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    chosen = calibration.profile.config["gamma"], calibration.profile.policy
    for row in calibration.rows():
        is_chosen = calibration.is_certified and (row["gamma"], row["policy"]) == chosen
        style = "bold" if is_chosen else None
        predicted, measured = row["predicted"], row["measured"]
        table.add_row(
            f"{'> ' if is_chosen else ''}{row['settings']}",
            str(row["gamma"]),
            *_figures(predicted),
            _number(predicted["fidelity"], 4),
            "",
            _number(predicted["regret"], 4),
            style=style,
        )
        if measured is not None:
            table.add_row(
                f"  measured on {measured['clips']}",
                "",
                *_figures(measured),
                _number(measured["fidelity"], 4),
                _number(measured["lower_bound"], 4),
                _number(measured["regret"], 4),
                style=style,
            )
    table.caption = (
        "predicted from recorded rows, and below it as measured on clips that chose nothing; tau: "
        "tokens per target pass; decode, caption: speed-up over the target alone, without and with "
        "the prompt; kept: fidelity, and at least what, with the stated confidence; regret: nats "
        "per token"
    )
    console = Console()
    console.print(table)
    beside = calibration.profile.figures["measured"]["beside"]
    if beside:
        figures = ", ".join(f"{name} {_number(value, 4)}" for name, value in beside.items())
        console.print(f"the profile by other metrics: {figures}", soft_wrap=True)


def _figures(values: dict[str, float]) -> list[str]:
    speeds = (f"{_number(values[name], 2)}x" for name in ("decode_speedup", "speedup"))
    return [_number(values["tau"], 2), *speeds]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
