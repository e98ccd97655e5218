"""Whether strict() says what HF's greedy decoding says, token for token, on held-out clips.

    python bench/strict_greedy.py [--pair real] [--clips 200] [--lines FILE] [--json FILE]

HF's captions are of clips with the same prompt together, ours of one after another, in float32.
Where the two part, both tokens are judged by the target itself, which reads what they have in
common in one pass: a near tie is one in which neither loses more than `NEAR` nats. With `--lines`
every clip is written down as it is done, and the same command goes on behind what is there.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from measuring import script
from pairs import trained
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lvspec.config import DecodeConfig
from lvspec.engine.decoder import Decoder
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.evaluation import MAX_NEW_TOKENS, Clip

BATCH = 8
NEAR = 1e-3  # nats; float32 sums in another order are apart by less


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Where two sequences part, or one ends; None if they are the same."""
    if ours == theirs:
        return None
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            return index
    return min(len(ours), len(theirs))


@torch.no_grad()
def regrets(target: PreTrainedModel, clip: Clip, common: list[int], tokens: list[int]) -> list:
    """Nats that each of `tokens` loses against the target's choice behind `common`."""
    inputs = dict(clip.inputs)
    added = torch.tensor([common], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], added], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    kinds = inputs["mm_token_type_ids"]
    zeros = torch.zeros_like(added).to(kinds.dtype)
    inputs["mm_token_type_ids"] = torch.cat([kinds, zeros], 1)
    logits: Tensor = target(**inputs, use_cache=False).logits[0, -1].float()
    return (logits.max() - logits[tokens]).tolist()


def batches(clips: list[Clip], indices: Iterable[int]) -> list[list[int]]:
    """Those of `indices` whose prompts have the same ids, at most `BATCH` together."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for index in indices:
        groups[tuple(clips[index].inputs["input_ids"][0].tolist())].append(index)
    return [g[i : i + BATCH] for g in groups.values() for i in range(0, len(g), BATCH)]


def greedy(target: PreTrainedModel, clips: list[Clip]) -> list[list[int]]:
    """HF's new tokens of clips with the same prompt, up to and with the end of each."""
    inputs = {name: torch.cat([clip.inputs[name] for clip in clips]) for name in clips[0].inputs}
    sequences = target.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    end = target.generation_config.eos_token_id
    found = []
    for row in sequences[:, inputs["input_ids"].shape[1] :].tolist():
        found.append(row[: row.index(end) + 1] if end in row else row)
    return found


def compare(
    target: PreTrainedModel, strict: Decoder, clip: Clip, theirs: list[int]
) -> dict[str, Any]:
    """Of one clip: how many tokens, where the two part, and what their tokens there lose."""
    generation = strict.generate(clip.inputs)
    ours = generation.tokens[0].tolist()
    found = {"tokens": len(theirs), "passes": generation.stats.num_iterations}
    parted = first_difference(ours, theirs)
    if parted is not None:
        end = target.generation_config.eos_token_id
        both = [tokens[parted] if parted < len(tokens) else end for tokens in (ours, theirs)]
        found |= {"parted": parted, "regrets": regrets(target, clip, theirs[:parted], both)}
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all clips: the same, parted at a near tie, parted at none."""
    parted = [row for row in rows if "parted" in row]
    near = sum(max(row["regrets"]) <= NEAR for row in parted)
    tokens = sum(row["tokens"] for row in rows)
    return {
        "clips": len(rows),
        "tokens": tokens,
        "tau": (tokens - len(rows)) / sum(row["passes"] for row in rows),
        "equal": len(rows) - len(parted),
        "near_ties": near,
        "different": len(parted) - near,
        "parted": parted,
    }


def main() -> int:
    parser = trained.parser_of(__doc__, clips=200)
    trained.add_pair(parser)
    parser.set_defaults(pair="real")
    parser.add_argument("--gamma", type=int, default=12)
    parser.add_argument("--lines", type=Path, metavar="FILE", help="one line of JSON a clip")
    arguments, setup = trained.begin(parser)
    target = setup.pair.target
    config = DecodeConfig(gamma=arguments.gamma, max_new_tokens=MAX_NEW_TOKENS)
    strict = Decoder(target, setup.pair.draft, AcceptancePolicy.strict(), config)
    rows: list[dict[str, Any]] = []
    if arguments.lines and arguments.lines.exists():
        rows = [json.loads(line) for line in arguments.lines.read_text().splitlines()]
    clips = setup.clips("evaluation", arguments.clips)
    left = sorted(set(range(len(clips))) - {row["clip"] for row in rows})
    for batch in tqdm(batches(clips, left), desc="batches", leave=False):
        for index, theirs in zip(batch, greedy(target, [clips[i] for i in batch]), strict=True):
            rows.append({"clip": index, **compare(target, strict, clips[index], theirs)})
            if arguments.lines:
                with open(arguments.lines, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    figures = summary(rows)
    print({name: value for name, value in figures.items() if name != "parted"})
    script.finish(arguments, {**figures, "pair": setup.name, "gamma": config.gamma})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
