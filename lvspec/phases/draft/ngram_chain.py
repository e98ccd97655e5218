"""N-grams draft for the draft: its passes verify several looked-up tokens each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lvspec.models.cache import Beginning, SlotCache
from lvspec.phases.draft.model_cache import CachedDrafter, DraftSource
from lvspec.phases.draft.ngram import History
from lvspec.phases.draft.passes import first_slots
from lvspec.phases.slots import Draft, tokens_up_to_end
from lvspec.phases.state import DecodeState
from lvspec.tree import chain_ancestors


class NGramChainDrafter(CachedDrafter):
    """The greedy chain of `ModelDrafter`, in fewer passes where the output repeats something.

    Every pass takes the last token and `lookup` tokens that stood behind it before. As far as the
    draft agrees they are drafted, and one of its own behind them, so a pass drafts from 1 to
    `lookup + 1` tokens, all of them the draft's greedy ones. (The idea is FLy's.) A sequence has
    what `passes` passes drafted, `gamma` at most, and nothing behind an end of sequence. Shapes are
    static, and nothing is read back; but on a CPU the passes end when all chains have ended.

    Args:
        lookup: Tokens that are looked up for each pass, >= 1.
        passes: Of the draft in one iteration, from 1 to `gamma`.
        ngram_max: The longest match that is looked for, see `look_up`.
        never: Ids that are not looked up, such as the placeholders of video tokens.
    """

    def __init__(
        self,
        source: DraftSource,
        *,
        gamma: int,
        lookup: int,
        passes: int,
        ngram_max: int,
        never: tuple[int, ...],
    ) -> None:
        super().__init__(source, gamma=gamma, pass_slots=lookup + 2)
        self.lookup, self.passes = lookup, passes
        self._history = History(ngram_max=ngram_max, never=never, device=source.model.device)
        # To look whether all chains are whole would stop a GPU.
        self._may_look = source.model.device.type == "cpu"

    def allocate(self, *, batch_size: int, capacity: int) -> None:
        # The last pass may stand at the last drafted token and look beyond.
        capacity += 2 * (self.lookup + 1)
        super().allocate(batch_size=batch_size, capacity=capacity)
        self._history.allocate(batch_size=batch_size, capacity=capacity)

    def prefill(
        self,
        inputs: Mapping[str, Any] | None,
        sequence: int,
        *,
        prompt: Tensor,
        target_cache: SlotCache,
        beginning: Beginning | None = None,
    ) -> None:
        kept = {"prompt": prompt, "target_cache": target_cache, "beginning": beginning}
        super().prefill(inputs, sequence, **kept)
        self._history.begin(sequence, prompt)

    def propose(self, state: DecodeState, target_kv_len: Tensor) -> Draft:
        cache, history, device = self.cache, self._history, self.model.device
        batch_size, most = len(state.last_two), self.model.vocab_size - 1
        step = self._step()
        begin = history.update(state)
        length, drafted = begin.clone(), torch.zeros_like(begin)
        offsets = torch.arange(self.lookup + 1, device=device)
        ancestors = chain_ancestors(self.lookup + 1, batch_size=batch_size, device=device)
        guesses, count = history.look_up(length, self.lookup)
        tokens = torch.cat([state.last_two, guesses], dim=1).clamp(max=most)
        *slots, is_first = first_slots(tokens, self._own_length(target_kv_len), cache)
        rows = step(*slots).logits[:, 1:]
        cache.kv_len.add_(~is_first)
        count = count.masked_fill(is_first, 0)  # rows of guesses are scratch then
        for following in range(self.passes - 1, -1, -1):
            best = self.head.ids(rows.argmax(-1))
            agrees = (best[:, :-1] == guesses) & (offsets[:-1] < count[:, None])
            agreed = agrees.int().cumprod(1).sum(1, dtype=torch.int32)
            # A chain that is whole takes part in what follows and stands still.
            gained = (agreed + 1).masked_fill(drafted >= self.gamma, 0)
            columns = length[:, None] + offsets
            history.ids.scatter_(1, columns, best)  # those behind what is gained are scratch
            length, drafted = length + gained, drafted + gained
            cache.kv_len.add_(gained)
            if following == 0:
                break
            if self._may_look and not bool(self._is_open(begin, drafted, state).any()):
                break
            last = history.ids.gather(1, (length[:, None] - 1).long())
            guesses, count = history.look_up(length, self.lookup)
            tokens = torch.cat([last, guesses], dim=1).clamp(max=most)
            rows = step(tokens, offsets, ancestors).logits
        shape = replace(self._shape, num_slots=(drafted.clamp(max=self.gamma) + 1).int())
        tokens = torch.cat([state.last_two[:, 1:], self._chain(begin)], dim=1)
        return Draft(tokens, shape.ending(tokens, state.eos_ids))

    def _chain(self, begin: Tensor) -> Tensor:
        """int64 `[B, gamma]`: what stands behind the output in the history."""
        drawn = begin[:, None] + torch.arange(self.gamma, device=begin.device)
        return self._history.ids.gather(1, drawn.long())

    def _is_open(self, begin: Tensor, drafted: Tensor, state: DecodeState) -> Tensor:
        """bool `[B]`: chains that are wanted and neither whole nor ended."""
        ended = tokens_up_to_end(self._chain(begin), state.eos_ids) <= drafted
        return (drafted < self.gamma) & ~ended & ~state.finished
