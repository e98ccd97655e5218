"""From a training run's checkpoints: captions for the draft to learn from, and what ships.

python lvspec/shapes/real/write.py captions --out runs/real --clips 1200
python lvspec/shapes/real/write.py judge target --out runs/real --clips 64
python lvspec/shapes/real/write.py adapters target --out runs/real
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from lvspec.shapes.real.data import BatchMaker
from lvspec.shapes.real.evaluation import ENGLISH, accuracy, describe, perplexity
from lvspec.shapes.real.pair import adapter_file, assemble, save_adapters
from lvspec.shapes.real.scenes import FORMATS, Scene, random_scene, scenes
from lvspec.shapes.real.train import IDEAL, JOINT, RECIPES, SEE

BATCH = 32  # clips described together


def trained_adapters(role: str, out: Path) -> dict[str, torch.Tensor]:
    """Of the last stage that has been run: `joint`, or `see` and `ideal` beside each other.

    Raises:
        FileNotFoundError: these have not been run.
    """
    joint = out / f"{role}-{JOINT}.pt"
    if joint.exists():
        return torch.load(joint, weights_only=True)["adapters"]
    found = {}
    for stage, tower in ((SEE, True), (IDEAL, False)):
        state = torch.load(out / f"{role}-{stage}.pt", weights_only=True)["adapters"]
        found |= {name: value for name, value in state.items() if (".visual." in name) == tower}
    return found


def facts(role: str) -> dict[str, object]:
    """What `pair.assemble` needs to know besides the adapters."""
    recipe = RECIPES[role]
    return {
        "layers": recipe.layers,
        "vision_size": recipe.vision_size,
        "vision_depth": recipe.vision_depth,
    }


def load_trained(
    role: str, out: Path
) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerBase]:
    """The model as it stands, float32, from what `train.py` has left in `out`."""
    tokenizer = torch.load(out / "tokenizer.pt", weights_only=False)
    text = torch.load(out / "text.pt", weights_only=True)
    return assemble(text, tokenizer, trained_adapters(role, out), facts(role)), tokenizer


def describe_all(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    shown: list[Scene],
    seed: int,
) -> list[str]:
    """Greedy captions of all scenes, those of one format together."""
    maker = BatchMaker(tokenizer, seed, tokens=1)
    texts: dict[int, str] = {}
    for clip in FORMATS:
        places = [index for index, scene in enumerate(shown) if scene.format == clip]
        for first in range(0, len(places), BATCH):
            chosen = places[first : first + BATCH]
            inputs = maker.prompt_inputs([shown[index] for index in chosen])
            inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
            texts |= dict(zip(chosen, describe(model, tokenizer, inputs)))
    return [texts[index] for index in range(len(shown))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="write.py", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("captions", "judge", "adapters"))
    parser.add_argument("role", nargs="?", choices=sorted(RECIPES), default="target")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints of train.py")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.what == "adapters":
        adapters = trained_adapters(arguments.role, arguments.out)
        save_adapters(adapter_file(arguments.role), adapters, facts(arguments.role))
        print(f"written to {adapter_file(arguments.role)}")
        return 0
    model, tokenizer = load_trained(arguments.role, arguments.out)
    if arguments.what == "captions":
        rng = random.Random(arguments.seed)
        # Short clips cost least, and what is said does not depend on the length.
        formats = rng.choices(FORMATS, (0.6, 0.2, 0.13, 0.07), k=arguments.clips)
        shown = [random_scene(rng, "training", clip) for clip in formats]
        texts = describe_all(model.to(torch.bfloat16), tokenizer, shown, arguments.seed)
        torch.save(list(zip(shown, texts)), arguments.out / "captions.pt")
    else:
        print(f"perplexity of plain English {perplexity(model, tokenizer, ENGLISH):.2f}")
        shown = scenes("calibration", arguments.clips, arguments.seed)
        texts = describe_all(model.to(torch.bfloat16), tokenizer, shown, arguments.seed)
        for scene, text in list(zip(shown, texts))[:4]:
            print(f"{scene.description}\n    {text}")
    print(json.dumps({k: round(v, 4) for k, v in accuracy(texts, shown).items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
