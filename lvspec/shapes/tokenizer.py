"""The word-level tokenizer of the embedded pair, with Qwen2.5-VL's special tokens.

A token is a word with its leading space, or a punctuation mark, so decoding is a concatenation and
text can be streamed token by token.
"""

from __future__ import annotations

import random

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lvspec.shapes.captions import PROMPTS, anchor_words, write_caption
from lvspec.shapes.scenes import random_scene

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


def vocabulary() -> list[str]:
    """All tokens in the order of their ids: special tokens, then words sorted by name."""
    rng = random.Random(0)
    words = set(anchor_words())
    for _ in range(4000):
        words.update(write_caption(random_scene(rng), rng).words)
    for prompt in PROMPTS:
        words.update(prompt.split())
    return spell(words)


def spell(words: set[str]) -> list[str]:
    """All tokens for these words and punctuation marks, and for the chat around them."""
    words = words | {"user", "assistant", "system"}
    spelled = (word if word in ".,?" else f" {word}" for word in words)
    return [*SPECIAL_TOKENS, *sorted(spelled)]


def build_tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer that target and draft share, made from the grammar alone.

    Args:
        words: All tokens in the order of their ids, `vocabulary()` if None.
    """
    tokens = {token: index for index, token in enumerate(words or vocabulary())}
    tokenizer = Tokenizer(WordLevel(tokens, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^\s.,?]+|[.,?]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<unk>",)],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
