"""Captioning held-out clips by several methods, and judging what they say.

Captions are judged after decoding, by the words in them. Nothing here is known to a decoding loop,
but for `oracle_gate`, which exists to show what perfect knowledge of the anchors would be worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lvspec.engine.result import Generation
from lvspec.evaluation.methods import EvaluationInterrupted, Method, Output, in_turns
from lvspec.evaluation.speeds import speeds
from lvspec.models.loading import Pair
from lvspec.shapes.captions import join, judge
from lvspec.shapes.data import EMBEDDED
from lvspec.shapes.world import World

MAX_NEW_TOKENS = 160  # the longest caption of the grammar has fewer


@dataclass
class Clip:
    """A scene, the file that shows it, what the models get of it, and who judges captions.

    `prompt` is what is asked, in words.
    """

    scene: Any
    path: Path
    inputs: Mapping[str, Tensor]
    judge: Callable[[str, Any], tuple[int, int, bool]] = judge
    prompt: str = ""
    draft_inputs: None = None  # the draft takes the same


def make_clips(
    pair: Pair, split: str, count: int, folder: Path, *, seed: int = 0, world: World = EMBEDDED
) -> list[Clip]:
    """Write clips of a split as MP4 files, and read each back from disk as the models see it."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    drawn = world.scenes(split, count, seed)
    for index, scene in enumerate(tqdm(drawn, desc=f"{split} clips", leave=False)):
        path = folder / f"{split}-{index:03d}.mp4"
        world.write_clip(scene, path, index)
        prompt = world.prompts[index % len(world.prompts)]
        words = join(prompt.split())
        clips.append(Clip(scene, path, pair.processor(path, words), world.judge, words))
    return clips


@dataclass
class MethodResult:
    """All captions of one method, clip by clip.

    Attributes:
        method: Its name.
        outputs: Of the clips that count.
        warm_up: Seconds of a caption beforehand that is not among them: what is planned, compiled
            and captured once is in it.
    """

    method: str
    outputs: list[Output] = field(default_factory=list)
    warm_up: float = 0.0

    def summary(self, clips: list[Clip], reference: MethodResult) -> dict[str, object]:
        """One row of the table; `fidelity` is relative to the captions of `reference`."""
        attributes, captions = self._accuracy(clips)
        target_attributes, target_captions = reference._accuracy(clips)
        return {
            "method": self.method,
            **speeds(self.outputs, reference.outputs),
            "attributes": attributes,
            "captions": captions,
            "fidelity": {
                "attributes": attributes / target_attributes if target_attributes else None,
                "captions": captions / target_captions if target_captions else None,
            },
            "regret": fmean(output.regret for output in self.outputs),
            "gamma": self.gammas,
            "parts": self.outputs[-1].parts,
            "warm_up_s": self.warm_up,
        }

    @property
    def gammas(self) -> list[int]:
        """Each length that chains had, in the order of captions; none of methods without drafts."""
        generations = [output.generation for output in self.outputs]
        found = [generation.stats.gamma for generation in generations if generation is not None]
        return list(dict.fromkeys(gamma for gamma in found if gamma))

    def _accuracy(self, clips: list[Clip]) -> tuple[float, float]:
        pairs = zip(self.outputs, clips, strict=True)
        judged = [clip.judge(output.text, clip.scene) for output, clip in pairs]
        right, total, whole = (sum(column) for column in zip(*judged, strict=True))
        return right / total, whole / len(judged)


def agreement(
    result: MethodResult, reference: MethodResult, read: Callable[[str], Mapping[str, object]]
) -> float:
    """The share of what the captions of `reference` state that those of `result` state alike.

    Where the target itself is unsure this says what a method changes, which accuracy does not: of
    two near ties either may be right.
    """
    same = total = 0
    for mine, theirs in zip(result.outputs, reference.outputs, strict=True):
        stated, expected = read(mine.text), read(theirs.text)
        same += sum(stated.get(name) == value for name, value in expected.items())
        total += len(expected)
    return same / total if total else 0.0


def run_methods(methods: Mapping[str, Method[Clip]], clips: list[Clip]) -> dict[str, MethodResult]:
    """Caption every clip by every method, in turns, see `in_turns`.

    Raises:
        EvaluationInterrupted: Ctrl-C; carries a `MethodResult` for each method, with the clips that
            all of them had captioned.
    """
    results = {name: MethodResult(name) for name in methods}
    try:
        for turn in in_turns(methods, tqdm(clips, desc="captions", leave=False)):
            result = results[turn.method]
            result.outputs.append(turn.output)
            if turn.warm_up is not None:
                result.warm_up = turn.warm_up
    except KeyboardInterrupt:
        complete = min(len(result.outputs) for result in results.values())
        for result in results.values():
            del result.outputs[complete:]
        raise EvaluationInterrupted(results) from None
    return results


def token_anchors(generation: Generation, *, world: World = EMBEDDED) -> list[bool]:
    """For each new token whether it is an anchor word of the grammar."""
    words = world.anchor_words()
    decoded = (generation.tokenizer.decode(token) for token in generation.tokens[0])
    return [word.strip() in words for word in decoded]


def oracle_gate(pair: Pair, *, world: World = EMBEDDED) -> Callable[..., Tensor]:
    """A scorer that knows which words are anchors, for the ablation: use it with 0.5.

    A row is an anchor if the target's choice there is an anchor word of the grammar.
    """
    vocabulary = pair.processor.tokenizer.get_vocab()
    ids = torch.tensor([vocabulary[f" {word}"] for word in sorted(world.anchor_words())])

    def score(output: object) -> Tensor:
        return torch.isin(output.logits.argmax(-1), ids).float()

    return score
