"""Train a small pair from nothing: minutes of one core, to be gone on with after a break.

    python bench/pairs_small/train.py wide --out runs/wide       (or unsure)
    python bench/ablation.py --pair runs/wide

Target and draft are trained one after the other, each with its log (`log.csv`: stage, step, loss,
seconds of CPU) and checkpoints; then the anchor threshold is set on calibration scenes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from pairs_small.pair import calibrate, write_facts
from pairs_small.recipes import RECIPES

from lvspec.shapes.real.training_ops import ATTENTION
from lvspec.shapes.train import STAGES, Trainer

ROLES = ("target", "draft")


def speed_up(model: nn.Module) -> None:
    """The same arithmetic in forms whose backward is cheap on a CPU, for training alone."""
    embed = model.model.visual.patch_embed
    # Strides as long as the kernel: a product with the flattened weight is the convolution.
    embed.forward = lambda pixels: functional.linear(pixels, embed.proj.weight.flatten(1))
    model.model.language_model.set_attn_implementation(ATTENTION)


def train(name: str, out: Path, *, steps: int | None = None) -> None:
    """Train both models of the recipe `name` into `out`, going on from what is there.

    Args:
        steps: Of every stage, instead of the recipe's: for a trial.

    Raises:
        ValueError: `out` holds checkpoints of another recipe.
    """
    recipe = RECIPES[name]
    for role in ROLES:
        training = recipe.trainings[role]
        if steps is not None:
            training = replace(training, **{f"{stage}_steps": steps for stage in STAGES})
        trainer = Trainer(
            role,
            out / role,
            training,
            world=recipe.world,
            glimpses=recipe.glimpses,
            config=recipe.configs[role],
        )
        speed_up(trainer.model)
        if trainer.resume():
            print(f"{role}: going on from {trainer.stage} step {trainer.step}")
        trainer.run()
        trainer.export()
    write_facts(out, name, calibrate(out, name))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="the folder of the pair")
    parser.add_argument("--steps", type=int, help="of every stage, for a trial")
    arguments = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    train(arguments.name, arguments.out, steps=arguments.steps)
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
