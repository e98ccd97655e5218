"""Train the real-language pair. Everything is seeded, counted in steps, and resumable.

    python lvspec/shapes/real/train.py target see --out runs/real
    python lvspec/shapes/real/train.py target ideal --out runs/real
    python lvspec/shapes/real/train.py target joint --out runs/real

`see`: the vision tower learns to give sums of the language model's own word embeddings, dense, for
every video token. `ideal`: adapters of the language model learn to caption from features made of
labels, as a perfect tower would give; this needs no tower, so both can run at once. `joint`: both
go on together, from pixels; the draft on captions that the target has written (`write.py`). Each
command goes on from its checkpoint when it is given again, also with another `--steps`: the
schedule is a function of step / steps. SIGTERM ends it behind a step, saved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvspec.shapes.data import IGNORE
from lvspec.shapes.real.captions import write_caption
from lvspec.shapes.real.data import (
    CLASSES,
    NOTHING,
    Batch,
    BatchMaker,
    GivenCaptions,
    IdealFeatures,
)
from lvspec.shapes.real.model import (
    ATTENTION,
    EVERY,
    LAYERS,
    VOCABULARY,
    adapter_state,
    add_lora,
    build_model,
    model_config,
)
from lvspec.shapes.real.replay import text_loss, write_texts
from lvspec.shapes.real.scenes import random_scene
from lvspec.shapes.real.training_ops import speed_up
from lvspec.shapes.real.weights import cached, find_gguf, read_tokenizer, read_weights

NUM_COLORS = CLASSES[0] - 1
VIDEO_START = 4  # <|im_start|> user \n <issue_start> stand before the video
SEE, IDEAL, JOINT = "see", "ideal", "joint"
# Of batches with 36, 72, 160 and 320 video tokens. What a tower sees does not depend on the length.
SHARES = {
    SEE: (0.8, 0.0, 0.2, 0.0),
    IDEAL: (0.75, 0.15, 0.07, 0.03),
    JOINT: (0.7, 0.15, 0.1, 0.05),
}


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on besides the data."""

    layers: tuple[int, ...]  # of SmolLM2's
    rank: int
    adapted: tuple[str, ...]
    vision_size: int
    vision_depth: int
    see_steps: int
    ideal_steps: int
    joint_steps: int
    see_rate: float = 2e-3
    rate: float = 2e-3
    joint_rate: float = 1e-3
    # Every so many joint steps one is taken on text of the model's own as well; 0 for none.
    replay_every: int = 4
    replay_texts: int = 4
    tower_rate: float = 2e-4
    see_batch_tokens: int = 2048
    ideal_batch_tokens: int = 1024
    joint_batch_tokens: int = 1024
    seed: int = 1


RECIPES = {
    "target": Recipe(
        layers=tuple(range(LAYERS)),
        rank=16,
        adapted=ATTENTION,
        vision_size=128,
        vision_depth=2,
        see_steps=1800,
        ideal_steps=300,
        joint_steps=2400,
    ),
    "draft": Recipe(
        layers=(0, 1, 2, 3, 9, 16, 23, 28, 29),
        rank=8,
        adapted=EVERY,
        vision_size=96,
        vision_depth=2,
        see_steps=1200,
        ideal_steps=500,
        joint_steps=800,
        rate=3e-3,
        joint_rate=2e-3,
        replay_every=0,
    ),
}


def schedule(step: int, steps: int, warmup: int = 10) -> float:
    """Linear warm-up, constant to half way, then linear to zero."""
    return min(1.0, (step + 1) / warmup, max(0.0, 2 * (1 - step / steps)))


class Trainer:
    """One model, its data and one stage of its training."""

    def __init__(self, role: str, stage: str, out: Path, recipe: Recipe, steps: int | None) -> None:
        torch.manual_seed(recipe.seed)
        self.role, self.stage, self.out, self.recipe = role, stage, out, recipe
        self.steps = steps or getattr(recipe, f"{stage}_steps")
        self.step = 0
        path = find_gguf()
        self.tokenizer = cached(out / "tokenizer.pt", lambda: read_tokenizer(path))
        text = cached(out / "text.pt", lambda: read_weights(path))
        config = model_config(
            self.tokenizer,
            layers=len(recipe.layers),
            vision_size=recipe.vision_size,
            vision_depth=recipe.vision_depth,
        )
        self.model = build_model(config, text, recipe.layers)
        self.ideal = IdealFeatures(text["embed_tokens.weight"].clone(), self.tokenizer)
        self.language = self.model.model.language_model
        # Frozen, so the precision costs nothing that an adapter cannot learn, and it is much faster
        # on processors that multiply bfloat16.
        self.language.to(torch.bfloat16)
        self.texts = None
        if stage == JOINT and recipe.replay_every:
            self.texts = cached(out / "texts.pt", lambda: write_texts(self.model))
        speed_up(self.language)
        self.lora = add_lora(self.model, recipe.rank, recipe.adapted)
        self.tower = list(self.model.model.visual.parameters())
        # What a patch shows, and which colours its frame shows: how many shapes follows from those.
        self.reader = nn.Linear(recipe.vision_size, sum(CLASSES) + NUM_COLORS)
        with torch.no_grad():
            self.model.model.visual.merger.mlp[2].bias.copy_(self.ideal.mean)
        self._choose_head()
        self.positions: dict[tuple, Tensor] = {}
        seed = recipe.seed * 1_000_000 + (SEE, IDEAL, JOINT).index(stage) * 100_000
        self.seed = seed + (role == "draft") * 500_000

    def _choose_head(self) -> None:
        # The loss is taken over the grammar's tokens and 3000 others: a fifth of the cost goes.
        rng = random.Random(0)
        texts = [write_caption(random_scene(rng), rng).text for _ in range(1500)]
        seen = {token for ids in self.tokenizer(texts).input_ids for token in ids}
        others = torch.randint(17, VOCABULARY, (3000,), generator=torch.Generator().manual_seed(0))
        chosen = sorted(seen | set(others.tolist()) | {self.tokenizer.eos_token_id})
        self.where = torch.full((VOCABULARY,), -1)
        self.where[chosen] = torch.arange(len(chosen))
        self.head = self.language.embed_tokens.weight.detach()[chosen].clone()

    def video_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`[B, tokens, hidden]` from the tower, and its patches before they are merged."""
        grid = torch.tensor([batch.format.grid]).expand(len(batch.ids), 3)
        features = self.model.model.get_video_features(batch.pixels, grid, return_dict=True)
        return torch.stack(list(features.pooler_output)), features.last_hidden_state

    def see_loss(self, batch: Batch, video: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """How far features are from ideal ones, and what patches and tokens cannot be told."""
        labels = batch.patch_labels
        wanted = self.ideal(labels)
        error = (video - wanted).pow(2).mean(-1)
        covered = labels[..., 0] != NOTHING
        shaped = covered.any(-1)
        losses = {"error": error.mean() + 2 * error[shaped].mean()}
        *scores, present = (
            self.reader(patches).view(*labels.shape[:3], -1).split((*CLASSES, NUM_COLORS), dim=-1)
        )
        colors = torch.arange(1, 1 + NUM_COLORS)
        shown = (labels[..., :1] == colors).flatten(1, 2).any(1)
        losses["present"] = functional.binary_cross_entropy_with_logits(
            present, shown[:, None, None].expand_as(present).float()
        )
        read, told = [], []
        for index, part in enumerate(scores):
            wanted_class = labels[..., index]
            read.append(functional.cross_entropy(part.flatten(0, 2), wanted_class.flatten()))
            # A token is asked what it shows where that is one thing, and how many where none is.
            lowest = torch.where(covered, wanted_class, 99).amin(-1)
            use = ~shaped if index >= 5 else shaped & (lowest == wanted_class.amax(-1))
            words = functional.normalize(self.ideal.words[index] - self.ideal.words[index].mean(0))
            direction = (video[use] - self.ideal.mean) @ words.T
            told.append(functional.cross_entropy(3 * direction, wanted_class[use].amax(-1)))
        return losses | {"read": torch.stack(read), "told": torch.stack(told)}

    def position_ids(self, batch: Batch) -> Tensor:
        """MRoPE positions `[3, B, T]`: HF's own for the prompt, then one after another."""
        clip, longest = batch.format, 700
        if clip not in self.positions:
            ids = torch.full((1, longest), self.tokenizer.eos_token_id)
            kinds = torch.zeros_like(ids)
            kinds[:, VIDEO_START : VIDEO_START + clip.video_tokens] = 2
            self.positions[clip], _ = self.model.model.get_rope_index(
                ids,
                kinds,
                video_grid_thw=torch.tensor([clip.grid]),
                second_per_grid_ts=torch.tensor([1.0]),
            )
        size, length = batch.ids.shape
        return self.positions[clip][..., :length].expand(3, size, length)

    def caption_loss(self, batch: Batch, video: Tensor) -> dict[str, Tensor]:
        """Weighted cross entropy of the captions, and what it is made of."""
        embeds = self.language.embed_tokens(batch.ids)
        after = VIDEO_START + batch.format.video_tokens
        embeds = torch.cat(
            [embeds[:, :VIDEO_START], video.to(embeds.dtype), embeds[:, after:]], dim=1
        )
        # Padding stands on the right, so the causal mask alone is right and no mask is passed.
        hidden = self.language(
            inputs_embeds=embeds, position_ids=self.position_ids(batch), use_cache=False
        ).last_hidden_state
        wanted = batch.labels != IGNORE
        logits = functional.linear(hidden[wanted], self.head).float()
        targets, weights = self.where[batch.labels[wanted]], batch.weights[wanted]
        losses = functional.cross_entropy(logits, targets, reduction="none", ignore_index=-1)
        anchors = weights > 1
        right = logits.detach().argmax(-1) == targets
        return {
            "caption": (losses * weights).sum() / weights.sum(),
            "filler": losses[~anchors].detach().mean(),
            "anchor": losses[anchors].detach().mean(),
            "anchor_right": right[anchors].float().mean(),
        }

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.stage == IDEAL:
            video = self.ideal(batch.patch_labels)
            video = video + 0.15 * torch.randn_like(video) * video.std(-1, keepdim=True)
            found = self.caption_loss(batch, video)
            return found["caption"], found
        video, patches = self.video_features(batch)
        found = self.see_loss(batch, video, patches)
        seeing = 30 * found["error"] + found["read"].sum() + found["told"].sum()
        seeing = seeing + 4 * found["present"]
        if self.stage == SEE:
            return seeing, found
        found |= self.caption_loss(batch, video)
        loss = found["caption"] + 0.05 * seeing
        if self.texts is not None and self.step % self.recipe.replay_every == 0:
            count = self.recipe.replay_texts
            chosen = (self.step // self.recipe.replay_every * count) % len(self.texts)
            found["text"] = text_loss(self.language, self.texts[chosen : chosen + count])
            loss = loss + found["text"]
        return loss, found

    def optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        tower = [*self.tower, *self.reader.parameters()]
        groups = {
            SEE: [(tower, recipe.see_rate, 0.02)],
            IDEAL: [(self.lora, recipe.rate, 0.0)],
            JOINT: [(self.lora, recipe.joint_rate, 0.0), (tower, recipe.tower_rate, 0.02)],
        }[self.stage]
        return torch.optim.AdamW(
            [{"params": p, "lr": r, "base": r, "weight_decay": decay} for p, r, decay in groups],
            betas=(0.9, 0.98),
        )

    def run(self, init: Path | None = None, save_every: float = 120.0) -> None:
        optimizer = self.optimizer()
        if not self.resume(optimizer):
            self.start(init)
        # A resumed run draws other batches than an unbroken one, never the same ones again.
        seed = self.seed + self.step
        tokens = getattr(self.recipe, f"{self.stage}_batch_tokens")
        if self.stage == JOINT and self.role == "draft":
            written = torch.load(self.out / "captions.pt", weights_only=False)
            maker = GivenCaptions(written, self.tokenizer, seed, tokens=tokens)
        else:
            maker = BatchMaker(self.tokenizer, seed, tokens=tokens, shares=SHARES[self.stage])
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        started = saved = time.time()
        with open(self.out / f"{self.role}-{self.stage}.log", "a") as log:
            while self.step < self.steps and not stopped.is_set():
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * schedule(self.step, self.steps)
                batch = maker.next()
                loss, found = self.losses(batch)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                self.step += 1
                row = {"step": self.step, "clips": len(batch.ids), "T": batch.ids.shape[1]}
                row |= {k: _rounded(v) for k, v in {"loss": loss, **found}.items()}
                row |= {"wall": round(time.time() - started), "cpu": round(time.process_time())}
                if self.stage != SEE or self.step % 20 == 0:
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                if time.time() - saved > save_every:
                    self.save(optimizer)
                    saved = time.time()
        self.save(optimizer)

    def path(self, stage: str) -> Path:
        return self.out / f"{self.role}-{stage}.pt"

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint beside the old one, then put it in its place."""
        state = {
            "adapters": adapter_state(self.model),
            "reader": self.reader.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": self.step,
        }
        temporary = self.path(self.stage).with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.path(self.stage))

    def _load(self, stage: str, part: str) -> bool:
        """Take over the tower, the adapters or both of a stage, if it has been run."""
        if not self.path(stage).exists():
            return False
        state = torch.load(self.path(stage), weights_only=True)
        adapters = {
            name: value
            for name, value in state["adapters"].items()
            if part in ("all", "tower" if ".visual." in name else "lora")
        }
        self.model.load_state_dict(adapters, strict=False)
        if part != "lora":
            self.reader.load_state_dict(state["reader"])
        return True

    def start(self, init: Path | None) -> None:
        """Begin a stage: `joint` where `see` and `ideal` ended, another with the adapters `init`.

        Raises:
            FileNotFoundError: one of these has not been run.
        """
        if init is not None:
            self.model.load_state_dict(torch.load(init, weights_only=True), strict=False)
        if self.stage != JOINT:
            return
        for stage, part in ((SEE, "tower"), (IDEAL, "lora")):
            if not self._load(stage, part):
                raise FileNotFoundError(
                    f"joint: expected {self.path(stage)}; run the stage {stage} first"
                )

    def resume(self, optimizer: torch.optim.Optimizer) -> bool:
        if not self._load(self.stage, "all"):
            return False
        state = torch.load(self.path(self.stage), weights_only=True)
        bases = [group["base"] for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, base in zip(optimizer.param_groups, bases):
            group["base"] = base
        self.step = state["step"]
        return True


def _rounded(value: Tensor) -> float | list[float]:
    return [round(x, 3) for x in value.tolist()] if value.ndim else round(value.item(), 4)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n")[0])
    parser.add_argument("role", choices=sorted(RECIPES))
    parser.add_argument("stage", choices=(SEE, IDEAL, JOINT))
    parser.add_argument("--out", type=Path, required=True, help="checkpoints and logs")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--init", type=Path, help="adapters to begin a stage with, a torch file")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    recipe = RECIPES[arguments.role]
    trainer = Trainer(arguments.role, arguments.stage, arguments.out, recipe, arguments.steps)
    trainer.run(arguments.init)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
