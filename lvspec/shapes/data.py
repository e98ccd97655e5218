"""Training batches: scenes, their frames as patches, their captions as ids; the embedded world."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lvspec.shapes.captions import PROMPTS, anchor_words, judge, read_attributes, write_caption
from lvspec.shapes.clips import seen_frames, write_clip
from lvspec.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    FRAME_SIZE,
    KINDS,
    NUM_FRAMES,
    SIZES,
    TURN_FRAME,
    Scene,
    random_scene,
    scenes,
)
from lvspec.shapes.tokenizer import vocabulary
from lvspec.shapes.world import MERGE, TEMPORAL, World

PATCH = 14
SECONDS_PER_GRID = 1.0
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
IGNORE = -100


def merge_labels(labels: np.ndarray) -> Tensor:
    """Labels of patches `[B, t, h, w, classes]` in the order of video tokens and their patches.

    Returns:
        int64 `[B, video tokens, 4, classes]`.
    """
    size, frames, rows, columns, classes = labels.shape
    x = labels.reshape(size, frames, rows // MERGE, MERGE, columns // MERGE, MERGE, classes)
    x = x.transpose(0, 1, 2, 4, 3, 5, 6)
    return torch.from_numpy(x.reshape(size, -1, MERGE**2, classes).copy())


def patch_labels(shown: list[Scene]) -> Tensor:
    """What each patch shows: int64 `[B, video tokens, 4, 5]`.

    The last axis is colour (0: no shape), kind, size, direction of the shape that covers the patch
    (IGNORE where there is none) and the background. Shapes stand on patch borders in the first
    frame of each temporal pair, so a patch is covered wholly or not at all.
    """
    colors, kinds, sizes = list(COLORS), list(KINDS), list(SIZES)
    directions, backgrounds = list(DIRECTIONS), list(BACKGROUNDS)
    grid_t, grid_h, grid_w = EMBEDDED.grid
    labels = np.full((len(shown), grid_t, grid_h, grid_w, 5), IGNORE, np.int64)
    labels[..., 0] = 0
    for scene, label in zip(shown, labels, strict=True):
        label[..., 4] = backgrounds.index(scene.background)
        for shape in scene.shapes:
            width = SIZES[shape.size] // PATCH
            for pair in range(grid_t):
                time = pair * TEMPORAL
                x, y = (int(value) // PATCH for value in shape.position(time))
                heading = shape.turn if shape.turn and time >= TURN_FRAME else shape.direction
                label[pair, y : y + width, x : x + width, :4] = (
                    1 + colors.index(shape.color),
                    kinds.index(shape.kind),
                    sizes.index(shape.size),
                    directions.index(heading),
                )
    return merge_labels(labels)


EMBEDDED = World(
    name="shapes",
    num_frames=NUM_FRAMES,
    height=FRAME_SIZE,
    width=FRAME_SIZE,
    patch=PATCH,
    grain=4.0,
    prompts=PROMPTS,
    vocabulary=vocabulary,
    classes=(1 + len(COLORS), len(KINDS), len(SIZES), len(DIRECTIONS), len(BACKGROUNDS)),
    draw=lambda rng: random_scene(rng, "training"),
    scenes=scenes,
    frames=seen_frames,
    patch_labels=patch_labels,
    caption=write_caption,
    write_clip=lambda scene, path, seed: write_clip(scene, path, seed=seed),
    judge=judge,
    read=read_attributes,
    anchor_words=anchor_words,
)
GRID = EMBEDDED.grid  # t, h, w in patches
VIDEO_TOKENS = EMBEDDED.video_tokens


@dataclass
class Batch:
    """Right-padded training batch. A caption's first token follows `prompt_len`."""

    scenes: list
    pixels: Tensor  # float32 [B * patches, 3 * TEMPORAL * patch * patch]
    ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T], the token each position predicts, IGNORE outside the caption
    weights: Tensor  # float32 [B, T], loss weight of each label


class NoiseBank:
    """Grain for training frames, drawn once: fresh noise for every step costs more than drawing."""

    def __init__(self, generator: torch.Generator, world: World = EMBEDDED) -> None:
        shape = (256, world.height, world.width, 3)
        self.noise = world.grain * torch.randn(shape, generator=generator)
        self.generator = generator

    def apply(self, frames: np.ndarray) -> Tensor:
        """uint8 `[..., H, W, 3]` to float32 of the same shape, with grain and a colour cast."""
        clean = torch.from_numpy(frames).float()
        count = clean.shape[:-3].numel()
        chosen = torch.randint(len(self.noise), (count,), generator=self.generator)
        cast = 1 + 0.03 * torch.randn(clean.shape[0], 1, 1, 1, 3, generator=self.generator)
        noisy = clean * cast + self.noise[chosen].view(clean.shape)
        return noisy.clamp(0, 255)


def patches(frames: Tensor, world: World = EMBEDDED) -> Tensor:
    """Frames `[B, T, H, W, 3]` (0 to 255) to Qwen2.5-VL's patches.

    float32 `[B * patches, 6 * patch * patch]`, 1176 values a patch of 14 pixels.

    A batched form of `lvspec.video.patches` for clips that need no resizing; a test holds the two
    against each other.
    """
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    x = (frames / 255 - mean) / std
    (grid_t, grid_h, grid_w), side = world.grid, world.patch
    x = x.view(-1, grid_t, TEMPORAL, grid_h // MERGE, MERGE, side, grid_w // MERGE, MERGE, side, 3)
    x = x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    return x.reshape(-1, 3 * TEMPORAL * side * side)


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, prompt: str, video_tokens: int = VIDEO_TOKENS
) -> list[int]:
    """Token ids of the chat prompt around one clip, with all its video placeholders."""
    content = [{"type": "video"}, {"type": "text", "text": prompt}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    text = text.replace("<|video_pad|>", "<|video_pad|>" * video_tokens)
    return tokenizer(text).input_ids


class BatchMaker:
    """Draws batches of training scenes. The same seed draws the same batches."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        anchor_weight: float,
        world: World = EMBEDDED,
    ) -> None:
        self.world = world
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.noise = NoiseBank(self.generator, world)
        self.prompts = [
            encode_prompt(tokenizer, prompt, world.video_tokens) for prompt in world.prompts
        ]
        self.words = tokenizer.get_vocab()
        self.end = tokenizer.eos_token_id
        self.anchor_weight = anchor_weight

    def scenes(self, size: int) -> tuple[list, Tensor]:
        drawn = [self.world.draw(self.rng) for _ in range(size)]
        frames = np.stack([self.world.frames(scene) for scene in drawn])
        return drawn, patches(self.noise.apply(frames), self.world)

    def batch(self, size: int) -> Batch:
        drawn, pixels = self.scenes(size)
        rows, labels, weights = [], [], []
        for scene in drawn:
            prompt = self.rng.choice(self.prompts)
            caption = self.world.caption(scene, self.rng)
            spelled = (w if w in ".,?" else f" {w}" for w in caption.words)
            ids = [self.words[word] for word in spelled] + [self.end]
            rows.append(prompt + ids[:-1])
            labels.append([IGNORE] * (len(prompt) - 1) + ids)
            importance = [self.anchor_weight if a else 1.0 for a in caption.anchors] + [1.0]
            weights.append([0.0] * (len(prompt) - 1) + importance)
        return Batch(drawn, pixels, _pad(rows, self.end), _pad(labels, IGNORE), _pad(weights, 0.0))


def _pad(rows: list[list], value: float) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
