"""What followed the last few tokens before is proposed again: no model drafts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lvspec import ops
from lvspec.models.cache import Beginning, SlotCache
from lvspec.phases.draft.base import Drafter
from lvspec.phases.slots import Draft, DraftShape
from lvspec.phases.state import DecodeState


class NGramDrafter(Drafter):
    """Looks the last tokens up in the prompt and the output, and proposes what stood behind them.

    On the device. A sequence in which they never stood before gets a root and no draft; where that
    is so of all, a CPU verifies the roots alone. Elsewhere drafts are of one shape in every
    iteration but for those with `only_root`.

    One token that stood there before is little reason to expect what followed it. So a sequence
    begins with matches of two; each draft of which nothing is accepted makes the match that the
    next one needs a token longer, up to `ngram_max`, and after one of which something is accepted a
    single token is enough.

    Args:
        gamma: Draft tokens at most.
        ngram_max: The longest match that is looked for, see `look_up`.
        never: Ids that are not proposed, such as the placeholders of video tokens.
        device: Of the target.
    """

    finds = True

    def __init__(
        self, *, gamma: int, ngram_max: int, never: tuple[int, ...], device: torch.device
    ) -> None:
        self.gamma, self._device = gamma, device
        # To look whether anything was found would stop a GPU.
        self._may_look = device.type == "cpu"
        self._ngram_max, self._first = ngram_max, min(2, ngram_max)
        self._least: Tensor | None = None
        self._history = History(ngram_max=ngram_max, never=never, device=device)
        self._sightings = Sightings()

    def allocate(self, *, batch_size: int, capacity: int) -> None:
        self._history.allocate(batch_size=batch_size, capacity=capacity)
        self._shape = DraftShape.chain(self.gamma, batch_size=batch_size, device=self._device)
        self._root = self._shape.root()
        if self._least is None:  # tokens of a match at least, int64 [B]
            self._least = torch.full((batch_size,), self._first, device=self._device)

    def prefill(
        self,
        inputs: Mapping[str, Any] | None,
        sequence: int,
        *,
        prompt: Tensor,
        target_cache: SlotCache,
        beginning: Beginning | None = None,
    ) -> None:
        self._history.begin(sequence, prompt)
        self._least[sequence] = self._first
        if self._may_look:
            self._sightings.begin(sequence, prompt)

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        root = Draft(state.last_two[:, 1:], self._root)
        if self._may_look and not self._sightings.may_match(state, self._least):
            return root
        length = self._history.update(state)
        tokens, count = self._history.look_up(length, self.gamma, self._least)
        if self.only_root:
            return replace(root, num_found=count)
        if self._may_look and not bool((count * ~state.finished).any()):
            return root
        tokens = torch.cat([state.last_two[:, 1:], tokens], dim=1)
        shape = replace(self._shape, num_slots=count + 1).ending(tokens, state.eos_ids)
        return Draft(tokens, shape, num_found=None if self._may_look else count)

    def commit(self, draft: Draft, acceptance: ops.Acceptance, target_kv_len: Tensor) -> None:
        if draft.tokens.shape[1] == 1:
            return
        is_draft, is_right = draft.shape.num_slots > 1, acceptance.num_accepted > 0
        longer = (self._least + 1).clamp(max=self._ngram_max)
        least = torch.where(is_right, 1, longer)
        self._least.copy_(torch.where(is_draft, least, self._least))


class Sightings:
    """How often tokens and pairs of them stood in each sequence, on the host.

    Where the last ones never stood before a look-up finds nothing: on a CPU, which need not wait to
    know, that is told in a hundredth of the time of a small model's pass.
    """

    def __init__(self) -> None:
        self._places: dict[int, _Seen] = {}

    def begin(self, place: int, prompt: Tensor) -> None:
        """A sequence begins with its prompt, int64 `[1, T]`."""
        self._places[place] = _Seen()
        self._places[place].add(prompt[0].tolist())

    def may_match(self, state: DecodeState, least: Tensor) -> bool:
        """Whether a look-up for one of the sequences that go on may find something.

        Args:
            state: What was generated so far.
            least: int64 `[B]`, as for `look_up`.
        """
        found = False
        facts = zip(state.num_out.tolist(), state.finished.tolist(), least.tolist(), strict=True)
        for place, (count, is_over, needed) in enumerate(facts):
            if not is_over:
                seen = self._places[place]
                seen.add(state.out_ids[place, seen.taken : count].tolist())
                seen.taken = count
                found |= seen.counts[seen.last_two if needed > 1 else seen.last_two[1]] > 1
        return found


class _Seen:
    """Of one sequence; `taken` is how much of its output is counted."""

    def __init__(self) -> None:
        self.counts: Counter[int | tuple[int, int]] = Counter()
        self.last_two, self.taken = (-1, -1), 0

    def add(self, tokens: list[int]) -> None:
        for token in tokens:
            self.last_two = (self.last_two[1], token)
            self.counts[self.last_two] += 1
            self.counts[token] += 1


class History:
    """Prompt and output of every sequence side by side, to look tokens up in.

    Args:
        ngram_max, never: As for `look_up`.
        device: Of the target.

    Attributes:
        ids: int64 `[B, N]`; what stands behind the output is scratch.
    """

    def __init__(self, *, ngram_max: int, never: tuple[int, ...], device: torch.device) -> None:
        self._ngram_max, self._device = ngram_max, device
        self._never = torch.tensor(never, dtype=torch.int64, device=device)
        self.ids: Tensor | None = None

    def allocate(self, *, batch_size: int, capacity: int) -> None:
        """Room for `capacity` ids of each sequence; what there was before is kept."""
        ids = torch.zeros(batch_size, capacity, dtype=torch.int64, device=self._device)
        if self.ids is None:
            self._prompt_len = torch.zeros(batch_size, dtype=torch.int32, device=self._device)
        else:
            ids[:, : self.ids.shape[1]] = self.ids
        self.ids = ids

    def begin(self, sequence: int, prompt: Tensor) -> None:
        """A sequence begins with its prompt, int64 `[1, T]`."""
        length = prompt.shape[1]
        self.ids[sequence, :length] = prompt[0]
        self._prompt_len[sequence] = length

    def update(self, state: DecodeState) -> Tensor:
        """Put the output behind the prompts; returns the length of both, int32 `[B]`."""
        # Scratch behind the output comes along, and the length leaves it out.
        offsets = torch.arange(state.out_ids.shape[1], device=self._device)
        self.ids.scatter_(1, self._prompt_len[:, None] + offsets, state.out_ids)
        return self._prompt_len + state.num_out

    def look_up(
        self, length: Tensor, num_tokens: int, least: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`look_up` in the first `length` ids."""
        return look_up(
            self.ids,
            length,
            ngram_max=self._ngram_max,
            num_tokens=num_tokens,
            never=self._never,
            least=least,
        )


def look_up(
    ids: Tensor,
    length: Tensor,
    *,
    ngram_max: int,
    num_tokens: int,
    never: Tensor,
    least: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What stood behind the last tokens when they stood there before.

    The last `ngram_max` tokens are looked for, then one fewer, down to the last one alone; of the
    columns of the longest match the latest counts. Nothing is read back from the device.

    Worked example, `ngram_max` 2: behind `7 8 1 7 8 2 9 7 8` the match is the second `7 8`, and
    `2 9 7 8` is proposed; behind `8 5 7 8` the match is `8` alone, and `5 7 8` is proposed.

    Args:
        ids: int64 `[B, N]`.
        length: int32 `[B]`, ids of each sequence; those behind do not count.
        ngram_max: Longest match, >= 1.
        num_tokens: Tokens to propose at most.
        never: int64 `[M]`, ids that are not proposed: the proposal ends before the first of them.
        least: int64 `[B]`, tokens of a match at least; None: one.

    Returns:
        tokens int64 `[B, num_tokens]` and how many of them are proposed, int32 `[B]`, 0 without a
        match. The others repeat the last token of the sequence.
    """
    capacity = ids.shape[1]
    columns = torch.arange(capacity, device=ids.device)
    last = (length.long() - 1)[:, None]
    is_match = columns < last  # where the last token stands, it is no match of itself
    matched = torch.zeros_like(ids)  # how many tokens match, those that end at each column
    for back in range(min(ngram_max, capacity)):
        wanted = ids.gather(1, (last - back).clamp(min=0))
        is_match = is_match & (ids.roll(back, dims=1) == wanted) & (columns >= back)
        matched += is_match
    best, column = (matched * capacity + columns).max(dim=1, keepdim=True)
    following = column + 1 + torch.arange(num_tokens, device=ids.device)
    tokens = ids.gather(1, following.clamp(max=capacity - 1))
    needed = capacity if least is None else capacity * least[:, None]
    is_proposed = (following <= last) & (best >= needed)
    is_proposed &= (tokens[..., None] != never).all(-1)
    is_proposed = is_proposed.int().cumprod(1) > 0  # nothing behind what is left out
    root = ids.gather(1, last.clamp(min=0))
    return torch.where(is_proposed, tokens, root), is_proposed.sum(1, dtype=torch.int32)
