"""Captions of scenes: anchors that the video decides, between fillers that have many synonyms.

The grammar never uses an anchor word as a filler, so the attributes of any text, also of a text no
grammar would produce, can be read back word by word. That is how captions are judged; decoding
never sees these functions.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from lvspec.shapes.scenes import BACKGROUNDS, COLORS, COUNTS, DIRECTIONS, KINDS, SIZES, Scene, Shape

TURN_VERBS = ("turns", "swings", "veers", "bends")
KEEP_VERBS = ("keeps", "continues", "goes")
PROMPTS = (
    "describe the video .",
    "what happens in this video ?",
    "describe this clip in detail .",
    "what does the clip show ?",
)

_WORD = re.compile(r"[a-z]+|[.,?]")


@dataclass
class Caption:
    """Words of a caption, and for each whether the video decides it."""

    words: list[str] = field(default_factory=list)
    anchors: list[bool] = field(default_factory=list)

    @property
    def text(self) -> str:
        return join(self.words)


def join(words: list[str]) -> str:
    """Words and punctuation as running text: no space before a full stop, comma, question mark."""
    return re.sub(r" ([.,?])", r"\1", " ".join(words))


class _Writer:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.caption = Caption()

    def fill(self, *choices: str) -> None:
        for word in self.rng.choice(choices).split():
            self.caption.words.append(word)
            self.caption.anchors.append(False)

    def maybe(self, probability: float, *choices: str) -> None:
        if self.rng.random() < probability:
            self.fill(*choices)

    def anchor(self, *choices: str) -> None:
        self.caption.words.append(self.rng.choice(choices))
        self.caption.anchors.append(True)


def _opening(writer: _Writer, scene: Scene) -> None:
    writer.fill(
        "the clip shows",
        "this clip shows",
        "in this video we see",
        "in the video we see",
        "here we can see",
        "the footage presents",
        "this short video features",
    )
    writer.anchor(COUNTS[len(scene.shapes)])
    writer.maybe(0.6, "simple", "plain", "flat", "basic")
    plural = "s" if len(scene.shapes) > 1 else ""
    writer.fill(f"shape{plural}", f"figure{plural}", f"object{plural}")
    writer.maybe(0.4, "moving around", "in the scene", "in motion")
    writer.fill("on a", "against a", "over a", "in front of a")
    writer.maybe(0.4, "plain", "uniform", "clean", "solid")
    writer.anchor(scene.background)
    writer.fill("background .", "backdrop .", "surface .")


def _introduction(writer: _Writer, shape: Shape, index: int) -> None:
    if index == 0:
        writer.fill(
            "to begin with , there is a",
            "first of all , there is a",
            "the first thing we notice is a",
            "the first thing to see is a",
            "starting from the beginning , we find a",
        )
    else:
        writer.fill(
            "besides that , there is a",
            "the other thing we notice is a",
            "next to it , there is a",
            "in addition , we find a",
            "the second thing to see is a",
        )
    writer.maybe(0.3, "rather", "quite", "fairly")
    writer.anchor(shape.size)
    writer.maybe(0.4, "bright", "vivid", "colorful")
    writer.anchor(shape.color)
    writer.anchor(shape.kind)


def _motion(writer: _Writer, shape: Shape) -> None:
    writer.fill("that", "which")
    writer.maybe(0.5, "slowly", "steadily", "smoothly", "gently", "calmly")
    writer.fill("moves", "travels", "drifts", "glides", "slides")
    writer.fill("to the", "towards the")
    writer.anchor(shape.direction)
    writer.maybe(0.5, "side of the frame", "edge of the frame", "part of the screen")
    writer.fill(
        ". after a while , it",
        ". after a moment , it",
        ". half way through , it",
        ". a moment later , it",
        "and then it",
        ", and soon it",
    )
    writer.maybe(0.4, "quietly", "clearly", "simply", "visibly")
    if shape.turn:
        writer.anchor(*TURN_VERBS)
        writer.fill("to the", "towards the")
        writer.anchor(shape.turn)
        writer.fill("instead .", "for the rest of the time .", "until the end .")
    else:
        writer.anchor(*KEEP_VERBS)
        writer.fill("on along the same", "on in the same")
        writer.fill("course", "path", "line", "way")
        writer.fill("as before .", "for the rest of the time .", "until the end .")


def _closing(writer: _Writer) -> None:
    writer.maybe(
        0.4,
        "nothing else happens in the clip .",
        "nothing else appears on the screen .",
        "nothing else changes during the video .",
    )
    writer.maybe(
        0.4,
        "the camera remains still throughout .",
        "the camera remains steady the whole time .",
        "the lighting remains constant throughout .",
        "the lighting remains even the whole time .",
    )
    writer.fill("overall , the", "in short , the", "all in all , the", "altogether , the")
    writer.fill("scene is", "video is", "clip is")
    writer.fill("simple", "short", "calm", "quiet")
    writer.fill("and easy to", "and pleasant to", "and nice to")
    writer.fill("follow .", "watch .", "understand .")


def write_caption(scene: Scene, rng: random.Random) -> Caption:
    """One of the many captions of a scene: fillers drawn from `rng`, anchors from the scene."""
    writer = _Writer(rng)
    _opening(writer, scene)
    for index, shape in enumerate(scene.shapes):
        _introduction(writer, shape, index)
        _motion(writer, shape)
    _closing(writer)
    return writer.caption


def anchor_words() -> frozenset[str]:
    """Every word that the video may decide."""
    groups = (COUNTS.values(), BACKGROUNDS, SIZES, COLORS, KINDS, DIRECTIONS, TURN_VERBS)
    return frozenset(word for group in groups for word in group) | frozenset(KEEP_VERBS)


def read_attributes(text: str) -> dict[str, list[str]]:
    """Every attribute that `text` states, by the names of `Scene.attributes`.

    A name maps to all values stated for it: more than one where the text contradicts itself.
    """
    found: dict[str, list[str]] = {}
    index = -1
    for word in _WORD.findall(text.lower()):
        if word in COUNTS.values():
            found.setdefault("count", []).append(word)
        elif word in BACKGROUNDS:
            found.setdefault("background", []).append(word)
        elif word in SIZES:
            index += 1
            found.setdefault(f"size{index}", []).append(word)
        elif word in COLORS:
            found.setdefault(f"color{index}", []).append(word)
        elif word in KINDS:
            found.setdefault(f"kind{index}", []).append(word)
        elif word in KEEP_VERBS:
            found.setdefault(f"turn{index}", []).append("none")
        elif word in TURN_VERBS:
            found.setdefault(f"turn{index}", []).append("turns")
        elif word in DIRECTIONS:
            turned = found.get(f"turn{index}", [])
            if turned and turned[-1] == "turns":
                turned[-1] = word
            else:
                found.setdefault(f"direction{index}", []).append(word)
    return found


def judge(text: str, scene: Scene) -> tuple[int, int, bool]:
    """(attributes right, attributes of the scene, whole caption right).

    A whole caption is right if every attribute is stated once and right, and nothing beyond them.
    """
    stated = read_attributes(text)
    expected = scene.attributes()
    right = sum(stated.get(name) == [value] for name, value in expected)
    return right, len(expected), right == len(expected) and len(stated) == len(expected)
