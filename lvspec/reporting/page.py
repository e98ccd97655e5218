"""The page: one HTML file with everything in it, that asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lvspec.engine.stats import WARM_UP_PHASES
from lvspec.environment import version
from lvspec.evaluation.intervals import CONFIDENCE
from lvspec.reporting.caption_view import CaptionView, caption_view
from lvspec.reporting.evaluation_view import WORDS, EvaluationView, evaluation_view
from lvspec.reporting.figures import Chart, acceptance_chart, per_cent, short, trade_chart
from lvspec.reporting.load import Captions, Evaluation
from lvspec.reporting.picture import caption_picture, chart_picture
from lvspec.reporting.replay import Replayed, Replays, replay_thresholds
from lvspec.reporting.tokens import Caption, read_caption

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_TRACED = 3
"""Of an evaluation's worst captions those that are shown token by token, if there are traces."""

MOST_CAPTIONS = 12
"""Captions that a page shows token by token; the others are in its table."""


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        text: HTML.
        picture: Makes a PNG of it.
    """

    text: str
    picture: Callable[[], bytes]


def captions_page(captions: Captions, title: str | None = None) -> Page:
    """The page of what `lvspec generate` wrote.

    Args:
        captions: What was read.
        title: Of the page; None: its clip's name, or how many captions there are.

    Raises:
        ImportError: Jinja2 is not installed.
        ValueError: A result is not what lvspec writes.
    """
    named = captions.source or "generation"
    read: list[Caption] = []
    failed: list[Mapping[str, Any]] = []
    for number, result in enumerate(captions.results, 1):
        if result.get("tokens"):
            read.append(read_caption(result, f"{named}: result {number}"))
        else:
            failed.append(result)
    views = [
        caption_view(caption, number, captions.facts)
        for number, caption in enumerate(read[:MOST_CAPTIONS], 1)
    ]
    replays = replay_thresholds(read, captions.facts)
    if title is None:
        title = views[0].name if len(read) == 1 else f"{len(captions.results)} captions"
    text = _render(
        "captions.html",
        title=title,
        views=views,
        others=read[MOST_CAPTIONS:],
        read=read,
        failed=failed,
        captions=captions,
        replays=replays,
        replay_chart=replay_chart(replays),
        facts=_facts(captions.facts),
        made_with=_made_with(captions.facts),
    )
    return Page(text, partial(_first_picture, views))


def evaluation_page(evaluation: Evaluation, title: str | None = None) -> Page:
    """The page of what `lvspec evaluate` wrote.

    Args:
        evaluation: What was read.
        title: Of the page; None: "Methods side by side".

    Raises:
        ImportError: Jinja2 or scipy is not installed.
        ValueError: A record is not what lvspec writes.
    """
    view = evaluation_view(evaluation)
    title = "Methods side by side" if title is None else title
    captions, traced = [], {}
    for index, worst in enumerate(view.worst):
        record = worst.record
        if record.get("trace") and len(captions) < MOST_TRACED:
            name = f"{record['method']} · {record['id']}"
            caption = read_caption(record, f"{evaluation.source}: {name}")
            captions.append(caption_view(caption, len(captions) + 1, evaluation.settings, name))
            traced[index] = len(captions)
    text = _render(
        "evaluation.html",
        title=title,
        view=view,
        words=WORDS,
        confidence=CONFIDENCE,
        acceptances=_acceptances(view),
        captions=captions,
        traced=traced,
        facts=_facts(evaluation.settings),
        made_with=_made_with(evaluation.settings),
    )
    return Page(text, partial(_chart_picture, view, title))


def _acceptances(view: EvaluationView) -> list[tuple[str, Chart]]:
    """(method, of how many passes each drafted token was accepted)."""
    found = []
    for row in view.rows:
        known = row.get("acceptance")
        if known and known["steps"] and known["accepted_by_position"]:
            shares = [count / known["steps"] for count in known["accepted_by_position"]]
            found.append((row["method"], acceptance_chart(shares, row["tau"])))
    return found


def _chart_picture(view: EvaluationView, title: str) -> bytes:
    if view.chart is None:
        raise ValueError("png: expected an evaluation with scores, got none")
    return chart_picture(view.chart, title)


def _first_picture(views: Sequence[CaptionView]) -> bytes:
    if not views:
        raise ValueError("png: expected at least one caption, got none")
    return caption_picture(views[0])


def replay_chart(replays: Replays) -> Chart | None:
    """tau against agreement for thresholds around the one that was used."""
    if not replays.points:
        return None
    points = []
    # Thresholds that give the same are one point.
    for (factor, tau, agreement), group in groupby(replays.points, _place):
        names = [_factor_name(point.factor) for point in group]
        kind, label = "swept", names[0]
        if factor is None:
            kind = "chosen"
        elif len(names) > 1:
            label = f"{names[0]} to {names[-1]}"
        told = f"{label}: tau {tau:.2f}, {per_cent(agreement)} the target’s own choice"
        points.append((tau, agreement, kind, label, told))
    return trade_chart(
        points,
        title="Tokens a pass against the share of tokens that are the target's own choice",
        x_label="tau (tokens a pass)",
        y_label="target's own",
    )


def _place(point: Replayed) -> tuple[float | None, float, float]:
    return None if point.factor is None else 1.0, point.tau, point.agreement


def _factor_name(factor: float | None) -> str:
    """Of a threshold, as a factor of the one that was used."""
    if factor is None:
        return "as it ran"
    return {0.0: "all anchors", math.inf: "no gate"}.get(factor, f"× {short(factor)}")


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what the results have in common, in words."""
    found = []
    for name, value in facts.items():
        if name in ("lvspec", "version", "interrupted"):
            continue
        if isinstance(value, Mapping):
            found += [(f"{name}.{key}", _said(item)) for key, item in value.items()]
        else:
            found.append((name, _said(value)))
    return [(name, value) for name, value in found if value]


def _made_with(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what a reader wants to know first."""
    policy, machine = facts.get("policy") or {}, facts.get("environment") or {}
    found = [
        ("target", _name(facts.get("target"))),
        ("draft", _name(facts.get("draft"))),
        ("policy", policy.get("name")),
        ("on", machine.get("device_name") or facts.get("device")),
    ]
    return [(name, _said(value)) for name, value in found if value]


def _name(model: Any) -> Any:
    """Of a model that is described by more than its name."""
    return model.get("name") if isinstance(model, Mapping) else model


def _said(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return ""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 300 else f"{text[:297]}..."


def _render(template: str, **context: Any) -> str:
    environment = _environment()
    from markupsafe import Markup

    script = environment.loader.get_source(environment, "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template(template).render(
        script=Markup(script),
        script_hash=digest,
        version=version("lvspec"),
        warm_up_phases=WARM_UP_PHASES,
        **context,
    )
    # Bytes of a file name that are not UTF-8 are shown as Python's escapes.
    return text.encode("utf-8", "backslashreplace").decode()


@cache
def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(
            "report: expected Jinja2, which is not installed (pip install 'lvspec[report]')"
        ) from error
    environment = Environment(
        loader=PackageLoader("lvspec.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(short=short, per_cent=per_cent, seconds=_seconds)
    return environment


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.1f} ms"
