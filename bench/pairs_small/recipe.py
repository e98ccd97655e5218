"""What a small pair is made by: its world, its two architectures, its two trainings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pairs_small.captions import Grammar
from pairs_small.clips import frames, label_classes, patch_labels, write_clip
from pairs_small.scenes import Setting, random_scene, scenes
from transformers import Qwen2_5_VLConfig

from lvspec.shapes.train import Recipe
from lvspec.shapes.world import World


@dataclass(frozen=True)
class PairRecipe:
    """A pair that can be trained.

    Attributes:
        world: What it describes.
        glimpses: Short clips of the same scenes, from which its towers learn to see and its
            language models where to look.
        configs, trainings: By role, `target` and `draft`.
    """

    world: World
    glimpses: World
    configs: Mapping[str, Qwen2_5_VLConfig]
    trainings: Mapping[str, Recipe]


def small_training(**fields: Any) -> Recipe:
    """A recipe in which both parts learn from glimpses first, many scenes a step."""
    glimpses = {"vision_batch_size": 32, "vision_learning_rate": 3e-3, "warmup_steps": 50}
    return Recipe(**glimpses, **fields)


def glimpses_of(setting: Setting) -> Setting:
    """Two pairs of small frames, in one of which the shapes move; less is blended."""
    side, blended = 6 * setting.patch, setting.blended / 2
    return replace(setting, num_frames=4, height=side, width=side, steps=1, blended=blended)


def make_world(name: str, setting: Setting, grammar: Grammar, grain: float) -> World:
    """The world of a setting that is talked about by a grammar, with `grain` levels of noise."""
    return World(
        name=name,
        num_frames=setting.num_frames,
        height=setting.height,
        width=setting.width,
        patch=setting.patch,
        grain=grain,
        prompts=grammar.prompts,
        vocabulary=grammar.vocabulary,
        classes=label_classes(setting),
        draw=lambda rng: random_scene(rng, setting, "training"),
        scenes=partial(scenes, setting),
        frames=lambda scene: frames(scene, setting),
        patch_labels=lambda shown: patch_labels(shown, setting),
        caption=grammar.caption,
        write_clip=lambda scene, path, seed: write_clip(scene, setting, path, grain, seed),
        judge=grammar.judge,
        read=grammar.read,
        anchor_words=grammar.anchor_words,
    )
