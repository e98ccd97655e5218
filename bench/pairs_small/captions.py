"""Captions from a grammar that is data: fillers to choose from, attributes of the video.

An attribute's word may depend on which shape it is said of, as where adjectives agree with nouns.
No anchor word is ever a filler, so every text can be read back word by word.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pairs_small.scenes import Scene

from lvspec.shapes.captions import Caption
from lvspec.shapes.tokenizer import spell

_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\w+|[.,?]")
STARTS_SHAPE = "size"  # the first attribute that is said of a shape


@dataclass(frozen=True)
class Grammar:
    """How a world is talked about.

    Attributes:
        parts: In order, either an attribute of a scene, as `color0`, or fillers of which one is
            said; an empty one is silence.
        words: Of each attribute of a scene, value to word.
        prompts: Of users, as they write them.
    """

    parts: tuple[str | tuple[str, ...], ...]
    words: Mapping[str, Mapping[str, str]]
    prompts: tuple[str, ...]

    def caption(self, scene: Scene, rng: random.Random) -> Caption:
        """One of the many captions of a scene: fillers drawn from `rng`, anchors as `said`."""
        said, caption = dict(scene.said), Caption()
        for part in self.parts:
            if isinstance(part, str):
                caption.words.append(self.words[part][said[part]])
                caption.anchors.append(True)
            else:
                fillers = rng.choice(part).split()
                caption.words += fillers
                caption.anchors += [False] * len(fillers)
        return caption

    def anchor_words(self) -> frozenset[str]:
        """Every word that the video may decide."""
        return frozenset(word for words in self.words.values() for word in words.values())

    def vocabulary(self) -> list[str]:
        """All tokens in the order of their ids."""
        texts = list(self.prompts)
        for part in self.parts:
            texts += () if isinstance(part, str) else part
        words = {word for text in texts for word in _TOKEN.findall(text)}
        return spell(words | self.anchor_words())

    def read(self, text: str) -> dict[str, list[str]]:
        """Every attribute that `text` states, to all values stated for it."""
        meanings = {
            word: (name.rstrip("01"), value)
            for name, words in self.words.items()
            for value, word in words.items()
        }
        found: dict[str, list[str]] = {}
        index = -1
        for word in _WORD.findall(text.lower()):
            if word not in meanings:
                continue
            name, value = meanings[word]
            index += name == STARTS_SHAPE
            key = name if name == "background" else f"{name}{index}"
            found.setdefault(key, []).append(value)
        return found

    def judge(self, text: str, scene: Scene) -> tuple[int, int, bool]:
        """(attributes right, attributes of the scene, whole caption right)."""
        stated, expected = self.read(text), scene.attributes()
        right = sum(stated.get(name) == [value] for name, value in expected)
        return right, len(expected), right == len(expected) and len(stated) == len(expected)
