"""report: a page, or a picture, of what happened."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvspec.engine.result import Generation
from lvspec.environment import NotWritten
from lvspec.policy import AcceptancePolicy
from lvspec.reporting.load import Captions, choose, load
from lvspec.reporting.page import captions_page, evaluation_page


def report(
    source: str | os.PathLike | Generation,
    page: str | os.PathLike | None = None,
    *,
    png: str | os.PathLike | None = None,
    captions: Sequence[str | int] = (),
    title: str | None = None,
    video: str | os.PathLike | None = None,
    prompt: str | None = None,
    policy: AcceptancePolicy | None = None,
) -> str:
    """One self-contained HTML page of captions or of an evaluation; a picture too, if wanted.

    Args:
        source: The JSON of `lvspec generate --trace --json` (what no trace tells is left out, and
            the page says so), the JSONL of `lvspec evaluate`, or a `Generation`.
        page: Where the page goes; None: nowhere.
        png: Where a picture of a caption, or of the methods of an evaluation, goes (needs
            matplotlib); None: nowhere.
        captions: Which results of a file, by number from 1 or by the names of their videos; none:
            all, of which the first `MOST_CAPTIONS` are shown token by token.
        title: Of the page.
        video, prompt, policy: What a `Generation` does not know of itself.

    Returns:
        The page.

    Raises:
        ImportError: Jinja2 or matplotlib is not installed; says how.
        OSError: The source cannot be read, or the page not be written (`NotWritten`).
        ValueError: The source is something else, of another version, or there is nothing in it.
    """
    about: dict[str, Any] = {}
    if isinstance(source, Generation):
        given = {"video": video, "prompt": prompt}
        about = {name: os.fspath(value) for name, value in given.items() if value is not None}
        if policy is not None:
            about["policy"] = policy.to_dict()
    elif (video, prompt, policy) != (None, None, None):
        raise ValueError(
            "video, prompt, policy: expected None beside a file, which names them itself, got "
            f"{video!r}, {prompt!r}, {policy!r}"
        )
    found = load(source, **about)
    if captions:
        if not isinstance(found, Captions):
            raise ValueError(f"captions: expected none of an evaluation, got {list(captions)}")
        found = choose(found, [str(each) for each in captions])
    if isinstance(found, Captions):
        made = captions_page(found, title)
    else:
        made = evaluation_page(found, title)
    if page is not None:
        _write("page", page, made.text.encode())
    if png is not None:
        _write("png", png, made.picture())
    return made.text


def _write(name: str, path: str | os.PathLike, content: bytes) -> None:
    """The file appears, or is replaced, when it is complete."""
    file = Path(os.path.realpath(path))
    partial = file.with_name(f".{uuid.uuid4().hex}.part")
    try:
        if file.exists() and not file.is_file():  # a pipe or a device
            file.write_bytes(content)
            return
        partial.write_bytes(content)
        os.replace(partial, file)
    except OSError as error:
        reason = error.strerror or str(error)
        raise NotWritten(
            f"{name}: expected a file that can be written, got {path}: {reason}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
