"""Training batches: scenes, their frames as patches, what features should say, captions as ids."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lvspec.shapes.data import IGNORE, IMAGE_MEAN, IMAGE_STD
from lvspec.shapes.real.captions import (
    BACKGROUND_WORDS,
    COLOR_WORDS,
    COUNT_WORDS,
    KIND_WORDS,
    PROMPTS,
    SIZE_WORDS,
    read,
    write_caption,
)
from lvspec.shapes.real.clips import frames
from lvspec.shapes.real.scenes import FORMATS, PAIR, PATCH, Format, Scene, random_scene
from lvspec.shapes.real.weights import VIDEO_PAD
from lvspec.shapes.scenes import BACKGROUNDS, COLORS, DIRECTIONS, KINDS, SIZES

MERGE = 2
NOTHING = 0  # the label of a patch without a shape
# Values of colour (0: no shape), kind, size, direction (0: at rest), turned, background, count.
CLASSES = (1 + len(COLORS), len(KINDS), len(SIZES), 1 + len(DIRECTIONS), 2, len(BACKGROUNDS), 3)
# One word for each value, as many lists as there are classes; None says nothing.
DIRECTION_WORDS = {"left": "left", "right": "right", "top": "up", "bottom": "down"}
CLASS_WORDS: tuple[tuple[str | None, ...], ...] = (
    (None, *(COLOR_WORDS[name][0] for name in COLORS)),
    tuple(KIND_WORDS[name][0] for name in KINDS),
    tuple(SIZE_WORDS[name][0] for name in SIZES),
    (None, *(DIRECTION_WORDS[name] for name in DIRECTIONS)),
    (None, "turns"),
    tuple(BACKGROUND_WORDS[name][0] for name in BACKGROUNDS),
    tuple(COUNT_WORDS[count][0] for count in (1, 2, 3)),
)


def patch_labels(scene: Scene) -> Tensor:
    """What each patch shows: int64 `[video tokens, 4, 7]`, the last axis as `CLASSES`.

    Kind, size, direction and turned are IGNORE where there is no shape.
    """
    pairs, rows, columns = scene.format.grid
    labels = np.full((pairs, rows, columns, len(CLASSES)), IGNORE, np.int64)
    labels[..., 0] = NOTHING
    labels[..., 5] = list(BACKGROUNDS).index(scene.background)
    labels[..., 6] = len(scene.shapes) - 1
    for shape in scene.shapes:
        width = SIZES[shape.size] // PATCH
        corners = shape.corners()
        for pair, moves in enumerate(shape.moving):
            x, y = (value // PATCH for value in corners[pair * PAIR])
            heading = 1 + list(DIRECTIONS).index(shape.heading(pair)) if moves else 0
            labels[pair, y : y + width, x : x + width, :5] = (
                1 + list(COLORS).index(shape.color),
                KINDS.index(shape.kind),
                list(SIZES).index(shape.size),
                heading,
                int(shape.turned(pair)),
            )
    merged = labels.reshape(pairs, rows // MERGE, MERGE, columns // MERGE, MERGE, len(CLASSES))
    merged = merged.transpose(0, 1, 3, 2, 4, 5).reshape(-1, MERGE**2, len(CLASSES))
    return torch.from_numpy(merged.copy())


class IdealFeatures:
    """What a tower should say of a clip: sums of the language model's own word embeddings."""

    def __init__(self, embeddings: Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
        self.mean = embeddings.mean(0)

        def direction(word: str | None) -> Tensor:
            if word is None:
                return torch.zeros_like(self.mean)
            vector = embeddings[tokenizer(f" {word}").input_ids].mean(0) - self.mean
            # About the length that a word's own embedding has.
            return 2.3 * vector / vector.norm()

        self.words = [torch.stack([direction(word) for word in words]) for words in CLASS_WORDS]
        self.ground = direction("background")

    def __call__(self, labels: Tensor) -> Tensor:
        """`labels` int64 `[..., tokens, 4, 7]` to float32 `[..., tokens, hidden]`."""
        # A shape is said once in a token, however many of the token's patches it covers.
        shapes = labels[..., :5]
        first = torch.ones(labels.shape[:-1], dtype=torch.bool)
        for later in range(1, MERGE**2):
            for before in range(later):
                same = (shapes[..., later, :] == shapes[..., before, :]).all(-1)
                first[..., later] &= ~same
        covered = (labels[..., 0] != NOTHING) & first
        said = torch.zeros(*labels.shape[:-1], self.mean.numel())
        for index in range(5):
            said += self.words[index][labels[..., index].clamp_min(0)]
        said = 0.8 * (said * covered[..., None]).sum(-2)
        empty = (labels[..., 0] == NOTHING).all(-1, keepdim=True)
        background = self.words[5][labels[..., 0, 5]]
        count = self.words[6][labels[..., 0, 6]]
        return (
            self.mean
            + said
            + torch.where(empty, background + self.ground + 0.8 * count, 0.3 * background)
        )


def patches(video: np.ndarray) -> Tensor:
    """Frames uint8 `[B, T, H, W, 3]` to Qwen2.5-VL's patches, `[B, patches, 3, 2, 14, 14]`."""
    size, length, height, width, _ = video.shape
    rows, columns = height // PATCH // MERGE, width // PATCH // MERGE
    x = video.reshape(size, length // PAIR, PAIR, rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    x = x.transpose(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    return torch.from_numpy(x.reshape(size, -1, 3, PAIR, PATCH, PATCH))


def normalise(pixels: Tensor) -> Tensor:
    """Patches of 0 to 255, float32 `[..., 3, 2, 14, 14]`, as a tower gets them: `[n, 1176]`."""
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return ((pixels - 255 * mean) / (255 * std)).view(-1, 3 * PAIR * PATCH * PATCH)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, video_tokens: int) -> list[int]:
    """Ids of the chat prompt around one clip, with all its video placeholders."""
    content = [{"type": "video"}, {"type": "text", "text": prompt}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text.replace(VIDEO_PAD, VIDEO_PAD * video_tokens)).input_ids


def encode_caption(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[bool]]:
    """Ids of a caption and its end, and for each whether it is a part of an anchor."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    anchors = read(text).anchors
    flags = [
        any(start < last and first < stop for first, last in anchors)
        for start, stop in encoded["offset_mapping"]
    ]
    return [*encoded.input_ids, tokenizer.eos_token_id], [*flags, False]


@dataclass
class Batch:
    """Right-padded samples of one format.

    Attributes:
        format: Of all clips.
        pixels: float32 `[B * patches, 1176]`.
        patch_labels: int64 `[B, video tokens, 4, 7]`.
        ids: int64 `[B, T]`, the video's placeholders included.
        labels: int64 `[B, T]`, the token that each position predicts, IGNORE outside the caption.
        weights: float32 `[B, T]`, loss weight of each label.
    """

    format: Format
    pixels: Tensor
    patch_labels: Tensor
    ids: Tensor
    labels: Tensor
    weights: Tensor


class BatchMaker:
    """Draws batches of training scenes. The same seed draws the same batches.

    Each is of one format; `tokens` bounds what a batch holds, so long clips come in fewer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        *,
        tokens: int,
        shares: tuple[float, ...] = (0.5, 0.25, 0.17, 0.08),
        anchor_weight: float = 3.0,
        split: str = "training",
    ) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.tokenizer, self.tokens, self.shares = tokenizer, tokens, shares
        self.anchor_weight, self.split = anchor_weight, split
        self.noise = 4 * torch.randn(600_000, generator=self.generator)
        self.prompts = {
            clip: [encode_prompt(tokenizer, prompt, clip.video_tokens) for prompt in PROMPTS]
            for clip in FORMATS
        }

    def _pixels(self, drawn: list[Scene]) -> Tensor:
        pixels = patches(np.stack([frames(scene) for scene in drawn])).float()
        # Grain drawn once: fresh noise for every step costs more than drawing the shapes.
        flat = pixels.view(-1)
        for first in range(0, len(flat), len(self.noise) // 2):
            part = flat[first : first + len(self.noise) // 2]
            start = self.rng.randrange(len(self.noise) // 2)
            part += self.noise[start : start + len(part)]
        size = (len(drawn), 1, 3, 1, 1, 1)
        pixels *= 1 + 0.03 * torch.randn(size, generator=self.generator)
        return normalise(pixels.clamp_(0, 255))

    def prompt_inputs(self, shown: list[Scene]) -> dict[str, Tensor]:
        """What HF's `generate` takes for scenes of one format, all with one prompt."""
        clip = shown[0].format
        ids = torch.tensor([self.rng.choice(self.prompts[clip])]).repeat(len(shown), 1)
        video = self.tokenizer.convert_tokens_to_ids(VIDEO_PAD)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": 2 * (ids == video).long(),
            "pixel_values_videos": self._pixels(shown),
            "video_grid_thw": torch.tensor([clip.grid]).repeat(len(shown), 1),
            "second_per_grid_ts": torch.ones(len(shown)),
        }

    def sample(self, clip: Format) -> tuple[Scene, str]:
        """A scene of this format and what is to be said of it."""
        scene = random_scene(self.rng, self.split, clip)
        return scene, write_caption(scene, self.rng).text

    def next(self, *, caption_tokens: int = 100) -> Batch:
        """A batch of about `tokens` tokens, where a caption is taken to have `caption_tokens`."""
        clip = self.rng.choices(FORMATS, self.shares)[0]
        size = max(1, self.tokens // (clip.video_tokens + caption_tokens))
        samples = [self.sample(clip) for _ in range(size)]
        rows, labels, weights = [], [], []
        for _, text in samples:
            prompt = self.rng.choice(self.prompts[clip])
            ids, flags = encode_caption(self.tokenizer, text)
            rows.append(prompt + ids[:-1])
            labels.append([IGNORE] * (len(prompt) - 1) + ids)
            importance = [self.anchor_weight if flag else 1.0 for flag in flags]
            weights.append([0.0] * (len(prompt) - 1) + importance)
        end = self.tokenizer.eos_token_id
        return Batch(
            clip,
            self._pixels([scene for scene, _ in samples]),
            torch.stack([patch_labels(scene) for scene, _ in samples]),
            _pad(rows, end),
            _pad(labels, IGNORE),
            _pad(weights, 0.0),
        )


class GivenCaptions(BatchMaker):
    """Batches of captions that a model has written, in place of the grammar's."""

    def __init__(
        self,
        captions: list[tuple[Scene, str]],
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        **options: object,
    ) -> None:
        super().__init__(tokenizer, seed, **options)
        self.of_format = {clip: [c for c in captions if c[0].format == clip] for clip in FORMATS}
        self.shares = tuple(float(len(self.of_format[clip])) for clip in FORMATS)

    def sample(self, clip: Format) -> tuple[Scene, str]:
        return self.rng.choice(self.of_format[clip])


def _pad(rows: list[list], value: float) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
