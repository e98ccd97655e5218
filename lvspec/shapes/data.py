"""Training batches of the embedded pair: scenes, their frames as patches, their captions as ids."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lvspec.shapes.captions import PROMPTS, write_caption
from lvspec.shapes.clips import seen_frames
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
)

PATCH, MERGE, TEMPORAL = 14, 2, 2
GRID = (NUM_FRAMES // TEMPORAL, FRAME_SIZE // PATCH, FRAME_SIZE // PATCH)  # t, h, w in patches
VIDEO_TOKENS = GRID[0] * GRID[1] * GRID[2] // MERGE**2
SECONDS_PER_GRID = 1.0
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
IGNORE = -100


@dataclass
class Batch:
    """Right-padded training batch. A caption's first token follows `prompt_len`."""

    scenes: list[Scene]
    pixels: Tensor  # float32 [B * patches, 3 * TEMPORAL * PATCH * PATCH]
    ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T], the token each position predicts, IGNORE outside the caption
    weights: Tensor  # float32 [B, T], loss weight of each label


class NoiseBank:
    """Grain for training frames, drawn once: fresh noise for every step costs more than drawing."""

    def __init__(self, generator: torch.Generator, levels: float = 4.0) -> None:
        shape = (256, FRAME_SIZE, FRAME_SIZE, 3)
        self.noise = levels * torch.randn(shape, generator=generator)
        self.generator = generator

    def apply(self, frames: np.ndarray) -> Tensor:
        """uint8 `[..., H, W, 3]` to float32 of the same shape, with grain and a colour cast."""
        clean = torch.from_numpy(frames).float()
        count = clean.shape[:-3].numel()
        chosen = torch.randint(len(self.noise), (count,), generator=self.generator)
        cast = 1 + 0.03 * torch.randn(clean.shape[0], 1, 1, 1, 3, generator=self.generator)
        noisy = clean * cast + self.noise[chosen].view(clean.shape)
        return noisy.clamp(0, 255)


def patches(frames: Tensor) -> Tensor:
    """Frames `[B, T, H, W, 3]` (0 to 255) to Qwen2.5-VL's patches `[B * patches, 1176]`.

    A batched form of `lvspec.video.patches` for clips that need no resizing; a test holds the two
    against each other.
    """
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    x = (frames / 255 - mean) / std
    grid_t, grid_h, grid_w = GRID
    x = x.view(
        -1, grid_t, TEMPORAL, grid_h // MERGE, MERGE, PATCH, grid_w // MERGE, MERGE, PATCH, 3
    )
    x = x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    return x.reshape(-1, 3 * TEMPORAL * PATCH * PATCH)


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Token ids of the chat prompt around one clip, with all its video placeholders."""
    content = [{"type": "video"}, {"type": "text", "text": prompt}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    text = text.replace("<|video_pad|>", "<|video_pad|>" * VIDEO_TOKENS)
    return tokenizer(text).input_ids


class BatchMaker:
    """Draws batches of training scenes. The same seed draws the same batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, anchor_weight: float) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.noise = NoiseBank(self.generator)
        self.prompts = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
        self.words = tokenizer.get_vocab()
        self.end = tokenizer.eos_token_id
        self.anchor_weight = anchor_weight

    def scenes(self, size: int) -> tuple[list[Scene], Tensor]:
        drawn = [random_scene(self.rng, "training") for _ in range(size)]
        frames = np.stack([seen_frames(scene) for scene in drawn])
        return drawn, patches(self.noise.apply(frames))

    def batch(self, size: int) -> Batch:
        drawn, pixels = self.scenes(size)
        rows, labels, weights = [], [], []
        for scene in drawn:
            prompt = self.rng.choice(self.prompts)
            caption = write_caption(scene, self.rng)
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


def patch_labels(scenes: list[Scene]) -> Tensor:
    """What each patch shows: int64 `[B, video tokens, 4, 5]`.

    The last axis is colour (0: no shape), kind, size, direction of the shape that covers the patch
    (IGNORE where there is none) and the background. Shapes stand on patch borders in the first
    frame of each temporal pair, so a patch is covered wholly or not at all.
    """
    colors, kinds, sizes = list(COLORS), list(KINDS), list(SIZES)
    directions, backgrounds = list(DIRECTIONS), list(BACKGROUNDS)
    labels = np.full((len(scenes), *GRID, 5), IGNORE, np.int64)
    labels[..., 0] = 0
    for scene, label in zip(scenes, labels, strict=True):
        label[..., 4] = backgrounds.index(scene.background)
        for shape in scene.shapes:
            width = SIZES[shape.size] // PATCH
            for pair in range(GRID[0]):
                time = pair * TEMPORAL
                x, y = (int(value) // PATCH for value in shape.position(time))
                heading = shape.turn if shape.turn and time >= TURN_FRAME else shape.direction
                label[pair, y : y + width, x : x + width, :4] = (
                    1 + colors.index(shape.color),
                    kinds.index(shape.kind),
                    sizes.index(shape.size),
                    directions.index(heading),
                )
    merged = labels.reshape(
        len(scenes), GRID[0], GRID[1] // MERGE, MERGE, GRID[2] // MERGE, MERGE, 5
    )
    merged = merged.transpose(0, 1, 2, 4, 3, 5, 6)
    return torch.from_numpy(merged.reshape(len(scenes), VIDEO_TOKENS, MERGE**2, 5).copy())
