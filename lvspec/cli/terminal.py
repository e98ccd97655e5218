"""Generations on a terminal: captions in the colours of their tokens, statistics, text as it comes.

Colours are `rich`'s matter: where stdout is no terminal there are none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lvspec.engine.result import Generation
from lvspec.engine.stats import WARM_UP_PHASES
from lvspec.engine.token_text import TokenText
from lvspec.environment import NotWritten
from lvspec.reference.kinds import KIND_NAMES

KIND_STYLES = {"exact": "", "loose": "yellow", "shift": "magenta", "bonus": "cyan"}
ANCHOR_STYLE = "bold underline"
_MEANINGS = {
    "exact": "as the target",
    "loose": "tolerated",
    "shift": "displaced",
    "bonus": "target's own",
}


def caption_text(generation: Generation, anchors: Sequence[bool] | None = None) -> Text:
    """The caption, every token in the colour of its kind.

    Args:
        generation: With a tokenizer.
        anchors: For each token of `generation.tokens` whether to mark it as an anchor; None marks
            none.

    Raises:
        ValueError: `generation` has no tokenizer, or `anchors` has another length.
    """
    if generation.tokenizer is None:
        raise ValueError("generation: expected one with a tokenizer, got tokenizer=None")
    tokens, kinds = generation.tokens[0].tolist(), generation.kinds[0].tolist()
    marks = [False] * len(tokens) if anchors is None else list(anchors)
    if len(marks) != len(tokens):
        raise ValueError(
            f"anchors: expected one for each of {len(tokens)} tokens, got {len(marks)}"
        )
    pieces, text = TokenText(generation.tokenizer), Text()
    for token, kind, marked in zip(tokens, kinds, marks):
        _append(text, pieces.push(token), KIND_STYLES[KIND_NAMES[kind]], marked)
    _append(text, pieces.flush(), "", False)
    text.rstrip()
    return text


def _append(text: Text, piece: str, style: str, marked: bool) -> None:
    word = piece.lstrip()
    if text.plain:
        # The space before a word is not part of it: an underlined one looks like a gap.
        text.append(piece[: len(piece) - len(word)])
    text.append(word, f"{style} {ANCHOR_STYLE}".strip() if marked else style)


def legend(*, anchors: bool = True) -> Text:
    """What the colours of `caption_text` mean.

    Args:
        anchors: Whether anchors are among what is explained.
    """
    entries = [(name, KIND_STYLES[name], _MEANINGS[name]) for name in KIND_NAMES]
    if anchors:
        entries.append(("anchor", ANCHOR_STYLE, "video decides"))
    text = Text()
    for name, style, meaning in entries:
        if text.plain:
            text.append("   ")
        text.append(name, style).append(f" {meaning}", "dim")
    return text


def tokens_per_second(generation: Generation) -> float:
    """New tokens over the time of all phases, prefill included and warm-up left out."""
    stats = generation.stats
    found = stats.seconds
    seconds = sum(found.values()) - sum(found[phase] for phase in WARM_UP_PHASES)
    count = generation.tokens.shape[1] - stats.num_warm_up_tokens
    return count / seconds if seconds > 0 else float("nan")


def statistics_line(generation: Generation) -> str:
    """Tokens, speed, tau, how many tokens of each kind, and regret, in one line.

    Warm-up stands apart where there was any, and so does what the target's generation config did.
    """
    stats = generation.stats
    parts = [
        f"{generation.tokens.shape[1]} tokens",
        f"{tokens_per_second(generation):.1f} tokens/s",
    ]
    found = stats.seconds
    warm_up = sum(found[phase] for phase in WARM_UP_PHASES)
    if warm_up >= 0.05:
        parts[-1] += f" without {warm_up:.1f} s of warm-up"
    if stats.gamma and stats.num_iterations:  # nothing to count in plain autoregression
        counts = ", ".join(f"{count} {name}" for name, count in stats.counts.items())
        if stats.gamma_choice is not None:
            parts.append(f"gamma {stats.gamma}")
        parts += [f"tau {stats.tau:.2f}", counts, f"regret {stats.regret:.2f} nats"]
    if stats.gate not in ("none", "on"):
        parts.append(f"gate {stats.gate}")
    if stats.generation_config:
        parts.append(
            ", ".join(f"{name} {value}" for name, value in stats.generation_config.items())
        )
    return " | ".join(parts)


def results_table(rows: Sequence[tuple[str, Generation]]) -> Text:
    """One line of statistics for each (video, generation), and a heading.

    The name comes last and in one piece, however long: one that is broken cannot be copied.
    """
    lines = [["tokens", "tokens/s", "tau", *KIND_NAMES, "regret", "video"]]
    for video, generation in rows:
        stats = generation.stats
        figures = [str(generation.tokens.shape[1]), f"{tokens_per_second(generation):.1f}"]
        figures += [f"{stats.tau:.2f}", *(str(stats.counts[kind]) for kind in KIND_NAMES)]
        lines.append([*figures, f"{stats.regret:.2f}", video])
    widths = [max(map(len, column)) for column in list(zip(*lines))[:-1]]
    texts = ["  ".join([*map(str.rjust, line, widths), line[-1]]) for line in lines]
    return Text("\n").join([Text(texts[0], "bold"), *map(Text, texts[1:])])


@contextmanager
def naming_stdout() -> Iterator[None]:
    """Within this context what stdout cannot take is an error that says so.

    Raises:
        BrokenPipeError: Whoever read it has left.
        NotWritten: It is full, for instance.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise NotWritten(
            f"stdout: expected room for the captions, got: {error.strerror}"
        ) from error


class PrintStreamer(BaseStreamer):
    """Prints the text of tokens as they are committed. One for each generation.

    Args:
        tokenizer: The target's.
        file: Where to print; None is stdout.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: TextIO | None = None) -> None:
        self._pieces = TokenText(tokenizer)
        self._file = file or sys.stdout
        self._prompt_seen = False
        self._printed = ""
        self._is_line_open = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:  # the first call brings the prompt
            self._prompt_seen = True
            return
        self._print("".join(self._pieces.push(token) for token in value.flatten().tolist()))

    def end(self) -> None:
        """Print what is left, and end the line."""
        self._print(self._pieces.flush())
        self._end_line()

    def stop(self, text: str) -> None:
        """Behind the end of a generation that was broken off: print what of `text` is missing.

        Tokens may have been committed that `put` was never given.
        """
        if text.startswith(self._printed):
            self._print(text[len(self._printed) :])
        self._end_line()

    def _print(self, text: str) -> None:
        text = text if self._printed else text.lstrip()
        if text:
            # Noted first: a Ctrl-C in answer to the text arrives when `print` returns.
            self._printed += text
            self._is_line_open = True
            with naming_stdout():
                print(text, end="", file=self._file, flush=True)

    def _end_line(self) -> None:
        if self._is_line_open:
            self._is_line_open = False
            with naming_stdout():
                print(file=self._file, flush=True)
