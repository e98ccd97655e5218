"""Captioning held-out clips by several methods, and judging what they say.

Captions are judged after decoding, by the words in them. Nothing here is known to a decoding loop,
but for `oracle_gate`, which exists to show what perfect knowledge of the anchors would be worth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lvspec.config import DecodeConfig
from lvspec.engine.decoder import Decoder
from lvspec.engine.result import Generation
from lvspec.models.loading import Pair
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.captions import join, judge
from lvspec.shapes.data import EMBEDDED
from lvspec.shapes.world import World

MAX_NEW_TOKENS = 160  # the longest caption of the grammar has fewer


@dataclass
class Clip:
    """A scene, the file that shows it, what the models get of it, and who judges captions."""

    scene: Any
    path: Path
    inputs: Mapping[str, Tensor]
    judge: Callable[[str, Any], tuple[int, int, bool]] = judge


@dataclass
class Output:
    """One caption by one method.

    Attributes:
        text: The caption.
        seconds: Wall time from inputs to tokens, prefill included, decoding of the file not.
        tokens: New tokens.
        passes: Forward passes of the target behind the prefill.
        regret: Nats lost by loose tokens, 0 for lossless methods.
        generation: The whole result, for methods that are ours.
    """

    text: str
    seconds: float
    tokens: int
    passes: int
    regret: float = 0.0
    generation: Generation | None = None

    @property
    def parts(self) -> dict[str, dict[str, int]]:
        """As `DecodeStats.parts`; none for methods that are not ours."""
        return {} if self.generation is None else self.generation.stats.parts

    @property
    def decode_seconds(self) -> float | None:
        """Of `seconds` without the prefill; None for methods that are not ours."""
        if self.generation is None:
            return None
        return self.seconds - self.generation.stats.seconds["prefill"]


Method = Callable[[Clip], Output]


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
        inputs = pair.processor(path, join(prompt.split()))
        clips.append(Clip(scene, path, inputs, world.judge))
    return clips


def lvspec_method(
    pair: Pair, policy: AcceptancePolicy | None, config: DecodeConfig, *, draft: str | None = None
) -> Method:
    """`lvspec.Decoder` under a policy; None is autoregression. `draft` in place of the pair's."""
    drafter = None if policy is None else (draft or pair.draft)
    return decoder_method(
        Decoder(pair.target, drafter, policy, config, tokenizer=pair.processor.tokenizer)
    )


def decoder_method(decoder: Decoder, policy: AcceptancePolicy | None = None) -> Method:
    """What this decoder says of a clip, under its own policy or this one."""

    def run(clip: Clip) -> Output:
        start = time.perf_counter()
        result = decoder.generate(clip.inputs, policy=policy)
        seconds = time.perf_counter() - start
        stats = result.stats
        count = result.tokens.shape[1]
        return Output(result.text, seconds, count, stats.num_iterations, stats.regret, result)

    return run


def huggingface_method(pair: Pair, *, assisted: bool) -> Method:
    """HF's own greedy `generate`, alone or with the draft as assistant, at HF's defaults."""
    options = {"assistant_model": pair.draft} if assisted else {}
    tokenizer = pair.processor.tokenizer
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    def run(clip: Clip) -> Output:
        nonlocal calls
        calls = 0
        hook = pair.target.model.language_model.register_forward_hook(count)
        try:
            start = time.perf_counter()
            sequences = pair.target.generate(
                **clip.inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **options
            )
            seconds = time.perf_counter() - start
        finally:
            hook.remove()
        tokens = sequences[0, clip.inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        # The prefill is one call; with an assistant it verifies the first draft too.
        return Output(text, seconds, len(tokens), calls if assisted else calls - 1)

    return run


@dataclass
class MethodResult:
    """All captions of one method, clip by clip.

    Attributes:
        method: Its name.
        outputs: Of the clips that count.
        warm_up: Seconds of a caption beforehand that is not among them: what is recorded, compiled
            and captured once is in it.
    """

    method: str
    outputs: list[Output] = field(default_factory=list)
    warm_up: float = 0.0

    def summary(self, clips: list[Clip], reference: MethodResult) -> dict[str, object]:
        """One row of the table; `fidelity` is relative to the captions of `reference`."""
        attributes, captions = self._accuracy(clips)
        target_attributes, target_captions = reference._accuracy(clips)
        speeds = [output.tokens / output.seconds for output in self.outputs]
        pairs = zip(self.outputs, reference.outputs, strict=True)
        speedups = [
            (mine.tokens / mine.seconds) / (theirs.tokens / theirs.seconds)
            for mine, theirs in pairs
        ]
        decoding = [
            (mine.tokens - 1) / mine.decode_seconds / ((theirs.tokens - 1) / theirs.decode_seconds)
            for mine, theirs in zip(self.outputs, reference.outputs, strict=True)
            if mine.decode_seconds and theirs.decode_seconds
        ]
        passes = sum(output.passes for output in self.outputs)
        # The first token comes from the prefill and costs no pass.
        tokens = sum(output.tokens - 1 for output in self.outputs)
        return {
            "method": self.method,
            "tokens_per_s": median(speeds),
            "speedup": median(speedups),
            "decode_speedup": median(decoding) if decoding else None,
            "tau": tokens / passes,
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


class EvaluationInterrupted(KeyboardInterrupt):
    """Ctrl-C while captioning. `results` holds the clips that every method had captioned."""

    def __init__(self, results: dict[str, MethodResult]) -> None:
        super().__init__()
        self.results = results


def run_methods(methods: Mapping[str, Method], clips: list[Clip]) -> dict[str, MethodResult]:
    """Caption every clip by every method.

    The methods take turns on each clip, in an order that rotates, so that a slow spell of the
    machine falls on all of them. One clip is captioned beforehand and not counted.

    Raises:
        EvaluationInterrupted: Ctrl-C; carries what is complete.
    """
    results = {name: MethodResult(name) for name in methods}
    names = list(methods)
    try:
        for name, method in methods.items():
            results[name].warm_up = method(clips[0]).seconds
        for index, clip in enumerate(tqdm(clips, desc="captions", leave=False)):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                results[name].outputs.append(methods[name](clip))
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
