"""What a draft step costs, and what a smaller head or fewer bytes are worth, on one CPU thread.

    python bench/draft_cost.py [--layers 24] [--dtype float32] [--tokens 32768 8192 2048]
        [--weights int8] [--context 512] [--rounds 9] [--json FILE]

The text model has the shape of LLaVA-OneVision's 0.5B draft (Qwen2-0.5B: hidden size 896,
vocabulary 151936, head and embedding one matrix) and random weights, which cost what trained ones
do. A step is a pass over one token behind `--context` others. All ways take turns, so that what
else the machine does hits them alike; times are medians, bytes those of the weights that are read.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable

import torch
from measuring import script
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from lvspec import quantize
from lvspec.models.attention import lvspec_attention_on
from lvspec.models.head import draft_head
from lvspec.models.model import Model
from lvspec.models.quantize import WEIGHTS
from lvspec.tree import chain_ancestors

VOCABULARY = 151936
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_draft(layers: int, dtype: torch.dtype) -> LlavaOnevisionForConditionalGeneration:
    """LLaVA-OneVision around Qwen2-0.5B's shape; its vision tower, which no step reads, is tiny."""
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": VOCABULARY,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": layers,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        tie_word_embeddings=True,
        image_token_id=5,
        video_token_id=6,
    )
    torch.manual_seed(0)
    return LlavaOnevisionForConditionalGeneration(config).eval().to(dtype)


def make_step(
    hf: LlavaOnevisionForConditionalGeneration, tokens: int | None, context: int
) -> tuple[Callable[[], None], int, dict[str, int]]:
    """A step of this draft with the head of so many tokens, the bytes that it reads, its parts."""
    model = Model(hf, "draft")
    ids = None
    if tokens is not None:
        ids = tuple(sorted(random.Random(0).sample(range(VOCABULARY), tokens)))
    head = draft_head(hf.lm_head, VOCABULARY, ids)
    cache = model.new_cache(batch_size=1, capacity=context + 8, num_slots=1)
    cache.kv_len.fill_(context)
    cache.k.normal_()
    cache.v.normal_()
    token, depth = torch.full((1, 1), 9), torch.zeros(1, dtype=torch.int64)
    ancestors = chain_ancestors(1, batch_size=1, device=model.device)

    def step() -> None:
        with lvspec_attention_on(model.text):
            head.ids(model.step(token, depth, ancestors, cache, head=head).logits.argmax(-1))

    return step, model.step_bytes_with(head), model.made.parts


@torch.inference_mode()
def main() -> int:
    parser = script.parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokens", type=int, nargs="*", default=[32768, 8192, 2048])
    parser.add_argument("--weights", choices=WEIGHTS, nargs="*", default=[])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = script.begin(parser)
    torch.set_num_threads(1)
    draft = make_draft(arguments.layers, DTYPES[arguments.dtype])
    ways = {"whole head": make_step(draft, None, arguments.context)}
    for tokens in arguments.tokens:
        ways[f"{tokens} tokens"] = make_step(draft, tokens, arguments.context)
    for weights in arguments.weights:
        quantised = quantize(copy.deepcopy(draft), weights)
        ways[weights] = make_step(quantised, None, arguments.context)
        for tokens in arguments.tokens[-1:]:
            ways[f"{weights}, {tokens} tokens"] = make_step(quantised, tokens, arguments.context)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step, *_ in ways.values():
        step()
    for _ in range(arguments.rounds):
        for name, (step, *_) in ways.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    whole = statistics.median(seconds["whole head"])
    rows = []
    for name, (_, moved, parts) in ways.items():
        median = statistics.median(seconds[name])
        rows.append(
            {"way": name, "ms": 1e3 * median, "bytes": moved, "share": median / whole}
            | {"bytes_share": moved / ways["whole head"][1], "parts": parts}
        )
    script.print_table(
        ("draft", "ms", "of the whole", "MB", "of the whole"),
        [
            (
                row["way"],
                f"{row['ms']:.1f}",
                f"{row['share']:.0%}",
                f"{row['bytes'] / 1e6:.0f}",
                f"{row['bytes_share']:.0%}",
            )
            for row in rows
        ],
        title=f"a draft step, {arguments.layers} layers, {arguments.dtype}, one thread",
    )
    facts = {name: getattr(arguments, name) for name in ("layers", "dtype", "context", "rounds")}
    script.finish(arguments, {"rows": rows, **facts})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
