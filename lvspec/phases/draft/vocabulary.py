"""Which tokens captions are made of, for a draft whose head has only those."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def frequent_tokens(
    captions: Iterable[Any], count: int, *, always: Iterable[int] = ()
) -> tuple[int, ...]:
    """The ids that occur most often in captions of one's own, for `DecodeConfig.draft_vocab`.

    Count captions that the target itself would say: those that it generated under a strict policy
    for videos like the ones to come, or captions of a training set, tokenized.

    Worked example: of `[[7, 7, 5], [5, 9]]` two ids are `(5, 7)`, as often each, the lower first.

    Args:
        captions: What `lvspec.generate` returned, of which the new tokens count, or token ids: a
            tensor of any shape, or a sequence of integers.
        count: Ids at most, >= 1; fewer where the captions have no more.
        always: Ids that are wanted besides, however often they occur, such as those of digits.

    Returns:
        The most frequent first, then those of `always` that are not among them.

    Raises:
        TypeError: A caption is something else.
        ValueError: `count` is below 1, or there are no captions with tokens in them.
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count: expected an integer, got {count!r}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    found: Counter[int] = Counter()
    for caption in captions:
        found.update(_ids(caption))
    if not found:
        raise ValueError("captions: expected some with tokens in them, got none")
    ids = sorted(found, key=lambda token: (-found[token], token))[:count]
    return tuple(dict.fromkeys([*ids, *always]))


def _ids(caption: Any) -> Sequence[int]:
    tokens = getattr(caption, "tokens", caption)  # of a `Generation`
    if isinstance(tokens, Tensor):
        if tokens.is_floating_point() or tokens.is_complex():
            raise TypeError(f"captions: expected token ids, got a tensor of {tokens.dtype}")
        return tokens.flatten().tolist()
    if isinstance(tokens, (list, tuple)) and all(type(token) is int for token in tokens):
        return tokens
    raise TypeError(
        "captions: expected what lvspec.generate returned, tensors or lists of token ids, got "
        f"{type(tokens).__name__}"
    )
