"""Held-out clips of the real-language pair: written, read from disk, captioned, judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lvspec.engine.result import Generation
from lvspec.models.loading import Pair
from lvspec.shapes.evaluation import Clip
from lvspec.shapes.real.captions import MEANINGS, PROMPTS, judge, judge_attributes, read
from lvspec.shapes.real.clips import write_clip
from lvspec.shapes.real.scenes import Scene, scenes
from lvspec.shapes.scenes import BACKGROUNDS

# English that has nothing to do with clips, the same in every version: is it still a language
# model? Written for this purpose.
ENGLISH = (
    "The harbour was quiet when the last ferry came in. A woman in a long coat stepped onto the "
    "pier, looked at the clock above the ticket office, and sighed. She had missed the train by "
    "ten minutes, and the next one would not leave until morning. There was a small hotel on the "
    "other side of the square, with a lamp above the door and a cat asleep on the step. The owner "
    "gave her a key without asking for her name. In the room there were a bed, a chair and a shelf "
    "with old books about the sea. She read for an hour, while the rain began to fall on the "
    "roof. Water expands when it freezes, which is why ice floats and why pipes burst in winter. "
    "Most plants take carbon dioxide from the air and, with the help of light, turn it into sugar. "
    "In economics, the price of a good rises when more people want it than there is to sell."
)


def make_clips(pair: Pair, split: str, count: int, folder: Path, *, seed: int = 0) -> list[Clip]:
    """Write clips of a split as MP4 files, and read each back from disk as the models see it."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for index, scene in enumerate(tqdm(scenes(split, count, seed), desc=split, leave=False)):
        path = folder / f"real-{split}-{index:03d}.mp4"
        write_clip(scene, path, seed=index)
        prompt = PROMPTS[(index // 4) % len(PROMPTS)]
        clips.append(Clip(scene, path, pair.processor(path, prompt), judge, prompt))
    return clips


def token_anchors(generation: Generation) -> list[bool]:
    """For each new token whether it is a part of what the caption states about the video."""
    decode = generation.tokenizer.decode
    flags, spans = [], []
    text = ""
    for token in generation.tokens[0].tolist():
        start = len(text)
        text += decode([token], skip_special_tokens=True)
        spans.append((start, len(text)))
    anchors = read(text).anchors
    for start, stop in spans:
        flags.append(any(start < last and first < stop for first, last in anchors))
    return flags


def oracle_gate(pair: Pair) -> Callable[..., Tensor]:
    """A scorer that knows which words are anchors, for the ablation: use it with 0.5.

    A row is an anchor if the target's choice there begins an anchor word.
    """
    tokenizer = pair.processor.tokenizer
    words = sorted({*MEANINGS, *BACKGROUNDS})
    ids = torch.tensor(sorted({tokenizer(f" {word}").input_ids[0] for word in words}))

    def score(output: object) -> Tensor:
        return torch.isin(output.logits.argmax(-1), ids).float()

    return score


def read_attributes(text: str) -> dict[str, object]:
    """Every attribute that `text` states, shapes in the order of the text."""
    stated = read(text)
    found: dict[str, object] = {"count": stated.count, "background": stated.background}
    for index, shape in enumerate(stated.shapes):
        found |= {f"{name}{index}": value for name, value in shape.items()}
    return found


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Of `text` by a model of the pair, the first token excepted."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    kinds = torch.zeros_like(ids)
    logits = model(input_ids=ids, mm_token_type_ids=kinds).logits[0, :-1].float()
    return math.exp(functional.cross_entropy(logits, ids[0, 1:]).item())


@torch.no_grad()
def describe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Tensor],
    *,
    max_new_tokens: int = 160,
) -> list[str]:
    """HF's greedy captions of a batch of clips of one format with one prompt."""
    sequences = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new = sequences[:, inputs["input_ids"].shape[1] :]
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in new]


def accuracy(texts: list[str], shown: list[Scene]) -> dict[str, float]:
    """Shares of attributes right, all together and by name, and of whole captions."""
    by_name: dict[str, list[bool]] = {}
    wholes = []
    for text, scene in zip(texts, shown, strict=True):
        found, whole = judge_attributes(text, scene)
        wholes.append(whole)
        for name, flags in found.items():
            by_name.setdefault(name, []).extend(flags)
    every = [flag for flags in by_name.values() for flag in flags]
    shares = {name: sum(flags) / len(flags) for name, flags in by_name.items()}
    return {
        "attributes": sum(every) / len(every),
        "captions": sum(wholes) / len(wholes),
        **shares,
    }
