"""Captions in plain English: anchors that the video decides, many ways to say everything.

Anchors may be words of one or several tokens ("doughnut", "leftwards", "turquoise"), digits and
synonyms. Any text can be read back, whoever wrote it: that is how captions are judged. Decoding
never sees these functions.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from itertools import permutations

from lvspec.shapes.real.scenes import Scene, Shape
from lvspec.shapes.scenes import BACKGROUNDS, COLORS, KINDS

PROMPTS = (
    "Describe the video.",
    "What happens in this clip?",
    "Describe this clip in detail.",
    "What does the video show?",
)

# The first word of each is the one that video features are made of.
COLOR_WORDS = {color: (color,) for color in COLORS} | {
    "cyan": ("turquoise", "cyan"),
    "purple": ("purple", "violet"),
}
KIND_WORDS = {kind: (kind,) for kind in KINDS} | {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "ring": ("doughnut", "ring"),
}
SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
BACKGROUND_WORDS = {name: (name,) for name in BACKGROUNDS} | {"gray": ("gray", "grey")}
COUNT_WORDS = {1: ("one", "single", "1"), 2: ("two", "pair", "2"), 3: ("three", "trio", "3")}
# Said alone ("moves leftwards") and said of a place ("moves to the left").
WAY_WORDS = {"left": "leftwards", "right": "rightwards", "top": "upwards", "bottom": "downwards"}
PLACE_WORDS = {"left": "left", "right": "right", "top": "top", "bottom": "bottom"}
TURN_WORDS = ("turns", "swings", "veers", "bends")
KEEP_WORDS = ("keeps", "continues", "carries")

# Words that no caption of the grammar has, but that a language model may find by itself.
_PARAPHRASES = {
    "direction": {
        "left": ("leftward",),
        "right": ("rightward",),
        "top": ("upward", "up"),
        "bottom": ("downward", "down"),
    },
    "kind": {"circle": ("disk",), "ring": ("donut",)},
}


def _meanings() -> dict[str, tuple[str, str | int]]:
    """Word to (attribute, value); backgrounds are told apart by the word that follows."""
    found: dict[str, tuple[str, str | int]] = {}
    groups = {
        "color": COLOR_WORDS,
        "kind": KIND_WORDS,
        "size": SIZE_WORDS,
        "count": COUNT_WORDS,
        "direction": {name: (WAY_WORDS[name], PLACE_WORDS[name]) for name in WAY_WORDS},
    }
    for attribute, values in [*groups.items(), *_PARAPHRASES.items()]:
        for value, words in values.items():
            found |= dict.fromkeys(words, (attribute, value))
    found |= dict.fromkeys(TURN_WORDS, ("turn", "turns"))
    return found | dict.fromkeys(KEEP_WORDS, ("turn", "none"))


MEANINGS = _meanings()
_BACKGROUND = {word: name for name, words in BACKGROUND_WORDS.items() for word in words}
_WORD = re.compile(r"[a-z]+|\d+")
_GROUND = re.compile(r"\s+(background|backdrop)")


@dataclass
class Caption:
    """A caption and the character ranges of what the video decides in it."""

    text: str = ""
    anchors: list[tuple[int, int]] = field(default_factory=list)


class _Writer:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.caption = Caption()

    def fill(self, *choices: str) -> None:
        self.caption.text += self.rng.choice(choices)

    def maybe(self, probability: float, *choices: str) -> None:
        if self.rng.random() < probability:
            self.fill(*choices)

    def anchor(self, *choices: str) -> None:
        word = self.rng.choice(choices)
        start = len(self.caption.text)
        self.caption.anchors.append((start, start + len(word)))
        self.caption.text += word


def _count(writer: _Writer, count: int, capital: bool) -> None:
    word = writer.rng.choice(COUNT_WORDS[count])
    if word in ("single", "pair", "trio"):
        writer.fill("A " if capital else "a ")
        writer.anchor(word)
        writer.fill(" " if word == "single" else " of ")
    else:
        writer.anchor(word.capitalize() if capital else word)
        writer.fill(" ")


def _opening(writer: _Writer, scene: Scene) -> None:
    count = len(scene.shapes)
    plural = "s" if count > 1 else ""
    nouns = tuple(noun + plural for noun in ("shape", "figure", "object", "geometric shape"))
    ground = (" background", " backdrop")
    before = ("on a ", "against a ", "in front of a ")
    form = writer.rng.randrange(4)
    if form == 0:
        writer.fill(*(words.capitalize() for words in before))
        writer.maybe(0.3, "plain ", "uniform ", "solid ")
        writer.anchor(*BACKGROUND_WORDS[scene.background])
        writer.fill(*ground)
        writer.fill(", we can see ", ", the video shows ", ", you can see ", ", there is ")
        _count(writer, count, capital=False)
        writer.maybe(0.3, "simple ", "plain ", "flat ", "moving ")
        writer.fill(*nouns)
        writer.fill(".")
        return
    if form == 1:
        _count(writer, count, capital=True)
    else:
        writer.fill(
            "The video shows ",
            "This short clip shows ",
            "We can see ",
            "In this clip there is " if count == 1 else "In this clip there are ",
            "The footage presents ",
            "Here we have ",
        )
        _count(writer, count, capital=False)
    writer.maybe(0.3, "simple ", "plain ", "flat ", "moving ")
    writer.fill(*nouns)
    if form == 1:
        verbs = ("appears ", "is shown ") if count == 1 else ("appear ", "are shown ")
        writer.fill(*(" " + verb for verb in verbs))
    else:
        writer.fill(" ", " ", " in motion ", " moving around ")
    writer.fill(*before)
    writer.maybe(0.3, "plain ", "uniform ", "solid ")
    writer.anchor(*BACKGROUND_WORDS[scene.background])
    writer.fill(*ground)
    writer.fill(".")


def _introduction(writer: _Writer, shape: Shape, index: int, count: int) -> None:
    if count == 1:
        writer.fill(" It is a ", " What moves is a ", " The object is a ", " There is a ")
    elif index == 0:
        writer.fill(" The first is a ", " First, there is a ", " To begin with, we see a ")
    elif index == count - 1:
        writer.fill(" The last is a ", " Finally, there is a ", " In addition, we see a ")
    else:
        writer.fill(" The next is a ", " Then there is a ", " Besides, we see a ")
    writer.anchor(*SIZE_WORDS[shape.size])
    writer.maybe(0.3, " bright", " vivid", ",")
    writer.fill(" ")
    writer.anchor(*COLOR_WORDS[shape.color])
    writer.fill(" ")
    writer.anchor(*KIND_WORDS[shape.kind])


def _heading(writer: _Writer, direction: str) -> None:
    if writer.rng.random() < 0.5:
        writer.fill(" ")
        writer.anchor(WAY_WORDS[direction])
        return
    writer.fill(" to the ", " towards the ")
    writer.anchor(PLACE_WORDS[direction])
    edge = " side" if direction in ("left", "right") else " edge"
    writer.maybe(0.3, " of the frame", " of the screen", edge)


def _motion(writer: _Writer, shape: Shape) -> None:
    writer.fill(" that", " which")
    writer.maybe(0.4, " slowly", " steadily", " smoothly", " gently")
    writer.fill(" moves", " travels", " drifts", " glides", " slides", " heads")
    _heading(writer, shape.direction)
    writer.fill(" and then it ", ". After a moment it ", ", and soon it ", ". Later on it ")
    if shape.turn:
        writer.anchor(*TURN_WORDS)
        _heading(writer, shape.turn)
        writer.fill(" instead.", ".", " until the end.")
        return
    word = writer.rng.choice(KEEP_WORDS)
    writer.anchor(word)
    writer.fill(
        *(
            {"keeps": " going", "continues": "", "carries": " on"}[word] + end
            for end in (" in the same way.", " on the same course.", " along the same line.")
        )
    )


def _closing(writer: _Writer) -> None:
    writer.maybe(
        0.35,
        " The camera remains still.",
        " Nothing else happens.",
        " The lighting remains constant.",
        " It is a calm scene.",
        " Overall, the scene is simple and easy to follow.",
    )


def write_caption(scene: Scene, rng: random.Random) -> Caption:
    """One of the many captions of a scene: words drawn from `rng`, anchors from the scene."""
    writer = _Writer(rng)
    _opening(writer, scene)
    for index, shape in enumerate(scene.shapes):
        _introduction(writer, shape, index, len(scene.shapes))
        _motion(writer, shape)
    _closing(writer)
    return writer.caption


@dataclass
class Stated:
    """What a text says. Each shape maps attributes to the first value that is stated for it."""

    count: int | None = None
    background: str | None = None
    shapes: list[dict[str, str]] = field(default_factory=list)
    repeated: bool = False  # something is stated of a shape twice
    anchors: list[tuple[int, int]] = field(default_factory=list)


def read(text: str) -> Stated:
    """The attributes that any text states, and where: a shape begins with a word of size."""
    stated = Stated()
    lower = text.lower()
    for match in _WORD.finditer(lower):
        word = match.group()
        if word in _BACKGROUND and _GROUND.match(lower, match.end()):
            stated.repeated |= stated.background is not None
            stated.background = stated.background or _BACKGROUND[word]
            stated.anchors.append(match.span())
            continue
        attribute, value = MEANINGS.get(word, (None, None))
        if attribute == "count":
            if stated.count is None:
                stated.count = value
                stated.anchors.append(match.span())
        elif attribute == "size":
            stated.shapes.append({"size": value})
            stated.anchors.append(match.span())
        elif attribute is not None and stated.shapes:
            stated.anchors.append(match.span())
            shape = stated.shapes[-1]
            if attribute == "direction" and shape.get("turn") == "turns":
                shape["turn"] = value
            elif attribute in shape:
                stated.repeated = True
            else:
                shape[attribute] = value
    return stated


def _wanted(shape: Shape) -> dict[str, str]:
    return {
        "size": shape.size,
        "color": shape.color,
        "kind": shape.kind,
        "direction": shape.direction,
        "turn": shape.turn or "none",
    }


def judge_attributes(text: str, scene: Scene) -> tuple[dict[str, list[bool]], bool]:
    """Attribute name to whether each of its statements is right, and whether the whole is.

    Stated shapes are matched with those of the scene in the way that is best for the text. The
    whole is right if every attribute is stated once and right, and nothing beyond them.
    """
    stated = read(text)
    wanted = [_wanted(shape) for shape in scene.shapes]
    padded = stated.shapes[: len(wanted) + 2] + [{}] * len(wanted)

    def agreement(order: tuple[int, ...]) -> int:
        return sum(
            padded[said].get(name) == value
            for said, shape in zip(order, wanted)
            for name, value in shape.items()
        )

    order = max(permutations(range(len(padded)), len(wanted)), key=agreement)
    found = {
        "count": [stated.count == len(wanted)],
        "background": [stated.background == scene.background],
    }
    for said, shape in zip(order, wanted):
        for name, value in shape.items():
            found.setdefault(name, []).append(padded[said].get(name) == value)
    right = all(all(values) for values in found.values())
    return found, right and len(stated.shapes) == len(wanted) and not stated.repeated


def judge(text: str, scene: Scene) -> tuple[int, int, bool]:
    """(attributes right, attributes of the scene, whole caption right)."""
    found, whole = judge_attributes(text, scene)
    flags = [flag for values in found.values() for flag in values]
    return sum(flags), len(flags), whole
