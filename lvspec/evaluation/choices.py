"""Which choice of a multiple choice question a text takes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lvspec.evaluation.samples import Sample

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_LABEL = r"[(\[]?([A-Za-z])[)\].:]\s*"
_QUOTES = r"[\s*_\"'`(\[]*"


def choice_of(text: str, choices: Sequence[str] = ()) -> str | None:
    """The letter of the choice that a text takes, "A" for the first; None if that is not clear.

    A text may be the letter (`B`, `(b)`, `B.`), begin with it (`B. A red ring`), name it (`The
    best answer is: B`), or be or contain the words of one choice alone.

    Args:
        text: What a model answered.
        choices: As listed in the question, with their letters (`A. red`) or without; none: any
            letter is one.
    """
    letters = LETTERS[: len(choices)] if choices else LETTERS
    words = [_words(each) for each in without_labels(choices)]
    said = _words(text)
    if said and words.count(said) == 1:
        return letters[words.index(said)]
    for found in (_alone(text), _at_start(text), _named(text)):
        if found is not None and found in letters:
            return found
    contained = [index for index, each in enumerate(words) if each and _is_within(each, said)]
    # Of "red" and "dark red" the longer one is meant.
    longest = [
        index
        for index in contained
        if not any(i != index and _is_within(words[index], words[i]) for i in contained)
    ]
    if len(longest) == 1:
        return letters[longest[0]]
    return _standing_out(text, letters) if not contained else None


def right_choice(sample: Sample) -> str | None:
    """The letter of the right choice; None if the sample is not multiple choice."""
    if sample.answer is None:
        return None
    if not sample.choices and _alone(sample.answer) is None:
        return None
    return choice_of(sample.answer, sample.choices)


def without_labels(choices: Sequence[str]) -> list[str]:
    """The choices without the letters that stand before each of them, in order: `A. red`."""
    found = [re.match(_LABEL, each.strip()) for each in choices]
    labels = "".join(match[1].upper() if match else "?" for match in found)
    if labels != LETTERS[: len(choices)]:
        return list(choices)
    return [each.strip()[match.end() :] for each, match in zip(choices, found) if match]


def _alone(text: str) -> str | None:
    match = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    return match[1].upper() if match else None


def _at_start(text: str) -> str | None:
    first = text.strip().partition("\n")[0]
    match = re.match(rf"\**{_LABEL}", first)
    return match[1].upper() if match else _alone(first)


def _named(text: str) -> str | None:
    """`answer is B`, `option (b)`; of several the last, which takes back those before."""
    # A small a is an article, and a small i no letter that anybody would answer with.
    pattern = rf"\b(?i:answer|option|choice)\b(?i:\s+is)?\s*:?{_QUOTES}([A-Z]|[b-hj-z])\b"
    found = re.findall(pattern, text)
    return found[-1].upper() if found else None


def _standing_out(text: str, letters: str) -> str | None:
    """A capital letter that stands by itself and is no word of English."""
    found = set(re.findall(r"(?<![\w'])([A-Z])(?![\w'])", re.sub(r"\bA (?=[a-z])|\bI\b", "", text)))
    return found.pop() if len(found) == 1 and found <= set(letters) else None


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


def _is_within(part: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    size = len(part)
    return any(whole[i : i + size] == part for i in range(len(whole) - size + 1))
