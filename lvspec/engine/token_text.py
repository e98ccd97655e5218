"""Tokens to text, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase


class TokenText:
    """Tokens to text, one at a time.

    The text of a token depends on the one before it, and a character may take several tokens: text
    comes with the token that completes it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context, self._done = 0, 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty for special tokens and unfinished characters."""
        self._ids.append(token)
        text = self._decode(len(self._ids))
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._take(text)

    def flush(self) -> str:
        """What is left where the tokens end in the middle of a character."""
        return self._take(self._decode(len(self._ids)))

    def _take(self, text: str) -> str:
        known = self._decode(self._done)
        self._context, self._done = self._done, len(self._ids)
        return text[len(known) :]

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._context : end], skip_special_tokens=True)


def pieces(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds: joined, the text of all, but for space around it."""
    text = TokenText(tokenizer)
    found = [text.push(token) for token in tokens]
    if found:
        found[-1] += text.flush()
    return found


def names(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """What each token is called by itself, special ones included; empty for ids without a name."""
    return {token: _name(token, tokenizer) for token in sorted(set(tokens))}


def _name(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    spelt = tokenizer.convert_ids_to_tokens(token) or ""
    text = tokenizer.decode([token])
    if not text or "\N{REPLACEMENT CHARACTER}" in text:  # a part of a character
        return spelt
    # SentencePiece decodes the first word of a text without the space before it.
    return f" {text}" if spelt.startswith("\N{LOWER ONE EIGHTH BLOCK}") and text[0] != " " else text
