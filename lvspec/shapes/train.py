"""Train the embedded pair from nothing.

    make train        (both models, into lvspec/shapes; the model card has the times)

Two stages. First the vision tower alone learns to say, for every patch, what it shows: without it
the direction of motion is not learnt. Then the whole model learns to caption. Between them a world
of long clips may have a third, in which it captions glimpses: that is where to look is learnt from
how many scenes are seen, not from how long each is. All are seeded, save a checkpoint every few
minutes, and go on from it when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from lvspec.shapes.data import (
    EMBEDDED,
    IGNORE,
    SECONDS_PER_GRID,
    Batch,
    BatchMaker,
)
from lvspec.shapes.model_configs import draft_config, target_config
from lvspec.shapes.tokenizer import build_tokenizer
from lvspec.shapes.world import MERGE, World
from lvspec.video.config import VideoProcessorConfig

STAGES = {"vision": 0, "glimpse": 2, "caption": 1}  # in this order; where each draws its batches
LOG_EVERY = 50  # steps
VIDEO_START = 3  # <|im_start|> user <|vision_start|>
TEXT_TOKENS = 364  # of prompt and caption, at most
SEEING = 0.3  # of the tower's own loss, beside a glimpse's caption


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on besides the architecture."""

    vision_steps: int
    caption_steps: int
    batch_size: int
    learning_rate: float
    anchor_weight: float = 3.0
    vision_batch_size: int = 32
    vision_learning_rate: float = 2e-3
    warmup_steps: int = 100
    seed: int = 1
    glimpse_steps: int = 0
    glimpse_batch_size: int = 32
    glimpse_learning_rate: float = 2e-3

    def steps(self, stage: str) -> int:
        """How many a stage has."""
        return getattr(self, f"{stage}_steps")


# The draft is given too few clips, not too little annealing: its schedule runs to zero like the
# target's, and what it has not learnt is how to see, as with real small models.
RECIPES = {
    "target": Recipe(vision_steps=700, caption_steps=3600, batch_size=16, learning_rate=1e-3),
    "draft": Recipe(vision_steps=400, caption_steps=3000, batch_size=16, learning_rate=1.5e-3),
}
CONFIGS = {"target": target_config, "draft": draft_config}


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class PatchReader(nn.Module):
    """Reads off a merged video token what each of its four patches shows."""

    def __init__(self, hidden_size: int, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.classes = classes
        self.read = nn.Linear(hidden_size, MERGE**2 * sum(classes))

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """`tokens` `[B, video tokens, hidden]`, `labels` as a world's `patch_labels`."""
        scores = self.read(tokens).view(*labels.shape[:3], sum(self.classes))
        losses = [
            functional.cross_entropy(part.flatten(0, 2).float(), labels[..., index].flatten())
            for index, part in enumerate(scores.split(self.classes, dim=-1))
        ]
        return torch.stack(losses).sum()


class Trainer:
    """One model, its optimizer, and where it stands.

    Args:
        role: "target" or "draft".
        out: The folder of its checkpoint, log and export.
        recipe: How it is trained.
        world: What it learns to describe.
        glimpses: What its tower alone learns from before, `world` if None. Patches of one clip show
            the same few things: of shorter clips a step sees more scenes for the same price.
        config: Its architecture, the embedded pair's if None.
    """

    def __init__(
        self,
        role: str,
        out: Path,
        recipe: Recipe,
        *,
        world: World = EMBEDDED,
        glimpses: World | None = None,
        config: Qwen2_5_VLConfig | None = None,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.role, self.out, self.recipe, self.world = role, out, recipe, world
        short = glimpses or world
        self.worlds = {"vision": short, "glimpse": short, "caption": world}
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer(world.vocabulary())
        self.model = Qwen2_5_VLForConditionalGeneration(config or CONFIGS[role]())
        # On the CPU, and for so short sequences, SDPA's backward takes ten times eager's time.
        self.model.model.language_model.set_attn_implementation("eager")
        self.reader = PatchReader(self.model.config.text_config.hidden_size, world.classes)
        self.stage, self.step = next(iter(STAGES)), 0
        self.positions = {stage: self._position_ids(seen) for stage, seen in self.worlds.items()}

    def _position_ids(self, world: World) -> Tensor:
        """MRoPE positions `[3, 1, longest]`: HF's own for the prompt, then one after another."""
        ids = torch.full((1, world.video_tokens + TEXT_TOKENS), self.tokenizer.eos_token_id)
        kinds = torch.zeros_like(ids)
        kinds[:, VIDEO_START : VIDEO_START + world.video_tokens] = 2
        positions, _ = self.model.model.get_rope_index(
            ids,
            kinds,
            video_grid_thw=torch.tensor([world.grid]),
            second_per_grid_ts=torch.tensor([SECONDS_PER_GRID]),
        )
        return positions

    def video_tokens(self, pixels: Tensor, size: int, world: World) -> Tensor:
        """`[B, video tokens, hidden]` from the vision tower."""
        grid = torch.tensor([world.grid]).expand(size, 3)
        features = self.model.model.get_video_features(pixels, grid, return_dict=True)
        return torch.stack(list(features.pooler_output))

    def caption_loss(self, batch: Batch) -> Tensor:
        size, length = batch.ids.shape
        world = self.worlds[self.stage]
        video = self.video_tokens(batch.pixels, size, world)
        embeds = self.model.get_input_embeddings()(batch.ids).to(video.dtype)
        after = VIDEO_START + world.video_tokens
        embeds = torch.cat([embeds[:, :VIDEO_START], video, embeds[:, after:]], dim=1)
        positions = self.positions[self.stage][..., :length].expand(3, size, length)
        # Padding stands on the right, so the causal mask alone is right and no mask is passed.
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False
        ).last_hidden_state
        wanted = batch.labels != IGNORE
        logits = self.model.lm_head(hidden[wanted])
        losses = functional.cross_entropy(logits.float(), batch.labels[wanted], reduction="none")
        weights = batch.weights[wanted]
        loss = (losses * weights).sum() / weights.sum()
        if self.stage == "glimpse":
            # Captions do not ask for directions until they say the rest, and would forget them.
            loss = loss + SEEING * self.reader.loss(video, world.patch_labels(batch.scenes))
        return loss

    def vision_loss(self, maker: BatchMaker) -> Tensor:
        size = self.recipe.vision_batch_size
        drawn, pixels = maker.scenes(size)
        tokens = self.video_tokens(pixels, size, maker.world)
        return self.reader.loss(tokens, maker.world.patch_labels(drawn))

    def run(self, save_every: float = 180.0) -> None:
        left = list(STAGES)[list(STAGES).index(self.stage) :]
        for stage in left:
            if stage != self.stage:
                self.stage, self.step, self.optimizer = stage, 0, None
                self.save()
            if self.recipe.steps(stage):
                self._run_stage(stage, save_every)

    def _optimizer(self) -> torch.optim.Optimizer:
        modules: list[nn.Module] = [self.model]
        if self.stage != "caption":
            seeing = self.model.model.visual if self.stage == "vision" else self.model
            modules = [seeing, self.reader]
        parameters = [p for module in modules for p in module.parameters()]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.02},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self._size_and_rate()[1], betas=(0.9, 0.98))

    def _size_and_rate(self) -> tuple[int, float]:
        """Batch size and highest learning rate of the stage."""
        recipe = self.recipe
        return {
            "vision": (recipe.vision_batch_size, recipe.vision_learning_rate),
            "glimpse": (recipe.glimpse_batch_size, recipe.glimpse_learning_rate),
            "caption": (recipe.batch_size, recipe.learning_rate),
        }[self.stage]

    def _run_stage(self, stage: str, save_every: float) -> None:
        recipe = self.recipe
        steps, (size, rate) = recipe.steps(stage), self._size_and_rate()
        optimizer = self.optimizer = self._optimizer()
        state = getattr(self, "optimizer_state", None)
        if state is not None:
            optimizer.load_state_dict(state)
            self.optimizer_state = None
        for group in optimizer.param_groups:
            group["base"] = rate
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # A resumed run draws other batches than an unbroken one, never the same ones again.
        maker = BatchMaker(
            self.tokenizer,
            recipe.seed * 1_000_000 + STAGES[stage] * 100_000 + self.step,
            recipe.anchor_weight,
            self.worlds[stage],
        )
        self.model.train()
        saved, average = time.time(), None
        bar = tqdm(total=steps, initial=self.step, desc=f"{self.role} {stage}", mininterval=10)
        while self.step < steps:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * schedule(self.step, steps, recipe.warmup_steps)
            with torch.autocast("cpu", torch.bfloat16):
                if stage == "vision":
                    loss = self.vision_loss(maker)
                else:
                    loss = self.caption_loss(maker.batch(size))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            self.step += 1
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            bar.update()
            if self.step % LOG_EVERY == 0 or self.step == steps:
                self._log(average)
            if time.time() - saved > save_every:
                self.save()
                saved = time.time()
        bar.close()
        self.save()

    def _log(self, loss: float) -> None:
        """Add a line to `log.csv`: stage, step, loss of late, seconds of CPU since the start."""
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / "log.csv", "a") as file:
            file.write(f"{self.stage},{self.step},{loss:.4f},{time.process_time():.0f}\n")

    def save(self) -> None:
        """Write the checkpoint beside the old one, then put it in its place."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "reader": self.reader.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "stage": self.stage,
            "step": self.step,
            "recipe": asdict(self.recipe),
        }
        temporary = self.out / "checkpoint.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.out / "checkpoint.pt")

    def resume(self) -> bool:
        """Take up the checkpoint in `out`, if there is one.

        Raises:
            ValueError: if it was made by another recipe.
        """
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(
                f"out: the checkpoint in {self.out} was made by {state['recipe']}, expected "
                f"{asdict(self.recipe)}; choose another folder or delete it"
            )
        self.model.load_state_dict(state["model"])
        self.reader.load_state_dict(state["reader"])
        self.stage, self.step = state["stage"], state["step"]
        self.optimizer_state = state["optimizer"]
        return True

    def export(self) -> Path:
        """Write float16 safetensors, configuration and tokenizer for `from_pretrained`."""
        folder = self.out / "export"
        exported = Qwen2_5_VLForConditionalGeneration(self.model.config)
        exported.load_state_dict(self.model.state_dict())
        exported.generation_config.eos_token_id = self.tokenizer.eos_token_id
        exported.generation_config.pad_token_id = self.tokenizer.pad_token_id
        exported.half().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        # Clips of any size are brought to the only size that the models know.
        area = self.world.height * self.world.width
        VideoProcessorConfig(
            patch_size=self.world.patch, min_pixels=area, max_pixels=area
        ).save_pretrained(folder)
        (folder / "recipe.json").write_text(json.dumps(asdict(self.recipe), indent=2) + "\n")
        return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n")[0])
    parser.add_argument("role", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="checkpoints and the export")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the layers: faster, needs a compiler"
    )
    parser.add_argument("--caption-steps", type=int, help="instead of the recipe's")
    parser.add_argument("--vision-steps", type=int, help="instead of the recipe's")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    recipe = asdict(RECIPES[arguments.role])
    for name in ("caption_steps", "vision_steps"):
        if getattr(arguments, name) is not None:
            recipe[name] = getattr(arguments, name)
    trainer = Trainer(arguments.role, arguments.out, Recipe(**recipe))
    if arguments.compile:
        for layer in trainer.model.model.language_model.layers:
            layer.compile(dynamic=True)
    if trainer.resume():
        print(f"going on from {trainer.stage} step {trainer.step} in {arguments.out}")
    trainer.run()
    print(f"written to {trainer.export()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
