"""plan_splits: where a split-KV kernel cuts the cache, so that relevance scores cost nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch

TEXT, VIDEO, PADDING = 0, 1, -1


class SplitPlan(NamedTuple):
    """Pieces of the cache in order, without gaps from position 0 to the capacity.

    All three are int32 `[B, P]`. A piece is cut at `kv_len` when it is used, and is empty if it
    begins there or later. The draft slots form one more piece, of text, that is not in the table.
    """

    start: torch.Tensor
    end: torch.Tensor  # one past the last position
    kind: torch.Tensor  # 0 text, 1 video, -1 padding (start = end = 0)


def piece_length(prompt_len: int, num_kv_heads: int) -> int:
    """Length at which to cut a prompt's runs: about 128 programs, 128 to 4096 positions each.

    Longer pieces leave multiprocessors idle, shorter ones are more to merge. A multiple of 64, the
    keys that a kernel takes at a time. It depends on the sequence alone, so that its bits do not
    depend on its batch.
    """
    even = -(-prompt_len * num_kv_heads // _PROGRAMS)
    return min(max(-(-even // 64) * 64, 128), 4096)


_PROGRAMS = 128
"""With the draft slots', one a KV head, about one for every multiprocessor of an H100 (132)."""


def plan_splits(
    visual: torch.Tensor,
    prompt_len: torch.Tensor,
    *,
    max_piece: int | None = None,
    tail_piece: int = 256,
    num_kv_heads: int = 8,
    num_pieces: int | None = None,
) -> SplitPlan:
    """Cut every sequence's cache into pieces that are wholly video or wholly text.

    Made once after prefill, on the host. The prompt is cut where `visual` changes and wherever a
    run is longer than `max_piece`; the generated tokens behind it into pieces of `tail_piece`, all
    of them text. Pieces never move, so the partial sums of a row are added in the same order
    however long the sequence has grown.

    Args:
        visual: uint8 `[B, N]`, 1 where the cached position is a video token.
        prompt_len: integers `[B]`, 0 to N.
        max_piece: Longest piece of the prompt, in positions. None: `piece_length` of every
            sequence's own prompt.
        tail_piece: Length of the pieces behind the prompt; the last one ends at N.
        num_kv_heads: Hkv, for `piece_length`.
        num_pieces: P, for tables whose shape must not change. Default: as many as the longest table
            needs.

    Raises:
        ValueError: A length is out of range, or a sequence needs more than `num_pieces` (it has
            many short runs: verify without a plan then).
    """
    if visual.dim() != 2:
        raise ValueError(f"visual: expected shape [B, N], got {tuple(visual.shape)}")
    batch_size, capacity = visual.shape
    if prompt_len.shape != (batch_size,):
        raise ValueError(
            f"prompt_len: expected shape ({batch_size},), got {tuple(prompt_len.shape)}"
        )
    for name, length in (("max_piece", max_piece), ("tail_piece", tail_piece)):
        if length is not None and length < 1:
            raise ValueError(f"{name}: expected at least 1 position, got {length}")
    tables = []
    for flags, length in zip(visual.tolist(), prompt_len.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(f"prompt_len: expected 0 to {capacity}, the capacity, got {length}")
        longest = piece_length(length, num_kv_heads) if max_piece is None else max_piece
        pieces: list[tuple[int, int, int]] = []
        start = 0
        for position in range(1, length + 1):
            is_video = flags[start] != 0
            full = position == length or position - start == longest
            if full or (flags[position] != 0) != is_video:
                pieces.append((start, position, VIDEO if is_video else TEXT))
                start = position
        for start in range(length, capacity, tail_piece):
            pieces.append((start, min(start + tail_piece, capacity), TEXT))
        tables.append(pieces)
    needed = max((len(pieces) for pieces in tables), default=0)
    if num_pieces is not None and needed > num_pieces:
        raise ValueError(
            f"num_pieces: expected at least {needed}, what a sequence here needs, got {num_pieces}"
        )
    width = needed if num_pieces is None else num_pieces
    for pieces in tables:
        pieces.extend([(0, 0, PADDING)] * (width - len(pieces)))
    table = torch.tensor(tables, dtype=torch.int32, device=visual.device).reshape(
        batch_size, width, 3
    )
    return SplitPlan(*(column.contiguous() for column in table.unbind(-1)))
