"""Plain text that SmolLM2 writes by itself, to train on beside captions.

What a model is trained on alone becomes all it can say. Texts sampled from the model as it was,
and learnt again beside the captions, keep it a language model, and need no data but its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lvspec.shapes.real.model import HIDDEN, LAYERS, VOCABULARY

DOCUMENT = 0  # <|endoftext|>, behind which SmolLM2's texts begin
TEXTS, LENGTH = 512, 128


@torch.no_grad()
def write_texts(text: dict[str, Tensor], *, count: int = TEXTS, seed: int = 0) -> Tensor:
    """Texts sampled from SmolLM2's own distribution, int64 `[count, LENGTH]`.

    Args:
        text: SmolLM2's weights, of `weights.read_weights`.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.model.load_state_dict(text)
    model.tie_weights()
    model = model.to(torch.bfloat16).eval()
    torch.manual_seed(seed)
    written = []
    while len(written) * 64 < count:
        ids = torch.full((64, 1), DOCUMENT)
        written.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                min_new_tokens=LENGTH - 1,
                max_new_tokens=LENGTH - 1,
                pad_token_id=DOCUMENT,
            )
        )
    return torch.cat(written)[:count]


def text_loss(language: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean cross entropy of texts, int64 `[B, T]`; a text model with MRoPE, tied embeddings."""
    positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
    embeds = language.embed_tokens(ids)
    hidden = language(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    logits = functional.linear(hidden.last_hidden_state[:, :-1], language.embed_tokens.weight)
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
