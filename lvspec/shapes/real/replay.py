"""Plain text that SmolLM2 writes by itself, to train on beside captions.

What a model is trained on alone becomes all it can say. Texts sampled from the model as it was,
and learnt again beside the captions, keep it a language model, and need no data but its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration

DOCUMENT = 0  # <|endoftext|>, behind which SmolLM2's texts begin
TEXTS, LENGTH, BATCH = 512, 128, 64


@torch.no_grad()
def write_texts(
    model: Qwen2_5_VLForConditionalGeneration,
    *,
    count: int = TEXTS,
    length: int = LENGTH,
    seed: int = 0,
) -> Tensor:
    """Texts sampled from a model's own distribution, int64 `[count, length]`.

    The same seed gives the same texts, and random numbers drawn later are what they were.

    Args:
        model: As `build_model` made it, without adapters.
        count, length: Texts, and tokens of each.
    """
    written = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for first in range(0, count, BATCH):
            ids = torch.full((min(BATCH, count - first), 1), DOCUMENT)
            written.append(
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    top_k=0,
                    min_new_tokens=length - 1,
                    max_new_tokens=length - 1,
                    pad_token_id=DOCUMENT,
                )
            )
    return torch.cat(written)


def text_loss(language: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean cross entropy of texts, int64 `[B, T]`; a text model with MRoPE, tied embeddings."""
    positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
    embeds = language.embed_tokens(ids)
    hidden = language(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    logits = functional.linear(hidden.last_hidden_state[:, :-1], language.embed_tokens.weight)
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
