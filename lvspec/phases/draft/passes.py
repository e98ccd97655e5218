"""The passes of a draft in one iteration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lvspec.models.cache import SlotCache
from lvspec.models.head import DraftHead
from lvspec.models.model import Model, RunChain
from lvspec.models.text_pass import StepOutput
from lvspec.tree import chain_ancestors

Step = Callable[[Tensor, Tensor, Tensor], StepOutput]
"""A pass over tokens `[B, n]` with their depths and ancestors, behind the cache's `kv_len`."""


class DraftPhase(ABC):
    """The passes of the draft in one iteration.

    Attributes:
        head: Makes logits of what may be proposed, the columns of which it knows as ids.
        scores: Whether its passes leave masses and peaks.
    """

    scores = False

    def __init__(self, head: DraftHead) -> None:
        self.head = head

    @abstractmethod
    def run(
        self, step: Step, last_two: Tensor, own_length: Tensor, cache: SlotCache
    ) -> Tensor | tuple[Tensor, ...]:
        """What was drafted.

        Args:
            step: Runs a pass.
            last_two: int64 `[B, 2]`, the last two committed tokens, as the draft knows them.
            own_length: int32 `[B]`, positions that the draft's cache holds before the second of
                them.
            cache: The draft's; its `kv_len` is moved.
        """


def read_last_two(step: Step, last_two: Tensor, own_length: Tensor, cache: SlotCache) -> StepOutput:
    """The pass over the last two committed tokens, with which every draft begins.

    After a full acceptance the draft has never seen the first of them; otherwise its row is written
    again with what it held. So the shape is the same in every iteration and no case is special.
    `kv_len` is `own_length` afterwards: the root's row is the next.
    """
    tokens, depths, ancestors, is_first = first_slots(last_two, own_length, cache)
    output = step(tokens, depths, ancestors)
    cache.kv_len.add_(~is_first)
    return output


def chain_passes(
    step: Step, last_two: Tensor, own_length: Tensor, cache: SlotCache, tokens: list[Tensor]
) -> Iterator[StepOutput]:
    """The passes of a chain, each over the token that was chosen by the last row of the one before.

    Args:
        step, last_two, own_length, cache: As for `DraftPhase.run`.
        tokens: Whoever iterates appends what is chosen, int64 `[B, 1]`, and stops when there are
            enough; the pass behind a token is run when it is asked for.
    """
    yield read_last_two(step, last_two, own_length, cache)
    yield from following_passes(step, cache, tokens)


def following_passes(step: Step, cache: SlotCache, tokens: list[Tensor]) -> Iterator[StepOutput]:
    """The passes of a chain behind its root, whose row stands at `kv_len`; see `chain_passes`."""
    batch_size, device = len(cache.kv_len), cache.kv_len.device
    depths = torch.zeros(1, dtype=torch.int64, device=device)
    ancestors = chain_ancestors(1, batch_size=batch_size, device=device)
    while True:
        cache.kv_len.add_(1)
        yield step(tokens[-1], depths, ancestors)


class Chain(DraftPhase):
    """int64 `[B, count]`: each token is the best of the row of the one before.

    Attributes:
        count: Passes.
    """

    def __init__(self, head: DraftHead, count: int) -> None:
        super().__init__(head)
        self.count = count

    @abstractmethod
    def begin(
        self, last_two: Tensor, own_length: Tensor, cache: SlotCache
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, depths and ancestors of the first pass, which is behind `cache.kv_len` then, and
        int32 `[B]`: by how much that moves on behind it. Arguments are those of `run`."""

    def run(self, step: Step, last_two: Tensor, own_length: Tensor, cache: SlotCache) -> Tensor:
        *first, moved = self.begin(last_two, own_length, cache)
        tokens = [self._best(step(*first))]
        cache.kv_len.add_(moved)
        following = following_passes(step, cache, tokens)
        while len(tokens) < self.count:
            tokens.append(self._best(next(following)))
        return torch.cat(tokens, dim=1)

    def run_at_once(
        self, chain: RunChain, last_two: Tensor, own_length: Tensor, cache: SlotCache
    ) -> Tensor:
        """The same by one operation."""
        first = self.begin(last_two, own_length, cache)
        return chain(*first, cache, self.count, self.head)

    def _best(self, output: StepOutput) -> Tensor:
        return self.head.ids(output.logits[:, -1:].argmax(-1))


class GreedyChain(Chain):
    """Behind the last two committed tokens, see `read_last_two`."""

    def begin(
        self, last_two: Tensor, own_length: Tensor, cache: SlotCache
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *first, is_first = first_slots(last_two, own_length, cache)
        return *first, (~is_first).int()


class GoneOnChain(Chain):
    """Behind the last token of a chain, `[B, 1]`, with which `run` begins.

    The draft's cache is as the passes before have left it.
    """

    def begin(
        self, last: Tensor, own_length: Tensor, cache: SlotCache
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cache.kv_len.add_(1)
        depths = torch.zeros(1, dtype=torch.int64, device=last.device)
        ancestors = chain_ancestors(1, batch_size=len(last), device=last.device)
        return last, depths, ancestors, torch.zeros_like(cache.kv_len)


def first_slots(
    tokens: Tensor, own_length: Tensor, cache: SlotCache
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The slots of a pass with which a draft begins: a chain from the last but one token on.

    Where that is a video token of the prompt, its row cannot be written again: it was made of a
    feature, not of a token. Then slot 0 is the root, whose row stands where it belongs, and the
    root again is slot 1, which does not see slot 0; so in any case slot 1 predicts what follows the
    root. Rows of slots from there on are scratch then.

    Args:
        tokens: int64 `[B, n]`, the last two committed tokens and what may follow them.
        own_length: As for `DraftPhase.run`.
        cache: The draft's; its `kv_len` is set to where slot 0 stands.

    Returns:
        tokens `[B, n]`, depths `[B, n]` and ancestors `[B, n]` of the pass, and bool `[B]`: whether
        slot 0 is the root. `kv_len` is to be moved by one where it is not.
    """
    batch_size, count = tokens.shape
    # An empty place of the batch has a length of 0, and nothing before it.
    before = (own_length - 1).clamp(min=0)
    is_first = cache.visual.gather(1, before[:, None].long()) != 0
    cache.kv_len.copy_(before + is_first[:, 0])
    first = torch.where(is_first, tokens[:, 1:2], tokens[:, :1])
    depths = (torch.arange(count, device=tokens.device) - is_first.long()).clamp(min=0)
    ancestors = chain_ancestors(count, batch_size=batch_size, device=tokens.device)
    others = ancestors[:, 1:] & ~is_first.long()  # bit 0 is slot 0
    return (
        torch.cat([first, tokens[:, 1:]], dim=1),
        depths,
        torch.cat([ancestors[:, :1], others], dim=1),
        is_first[:, 0],
    )


def run_phase(
    phase: DraftPhase, model: Model, cache: SlotCache, last_two: Tensor, own_length: Tensor
) -> Tensor | tuple[Tensor, ...]:
    """Run a phase: pass by pass, or a greedy chain at once where one operation does that.

    Args:
        phase: What is drafted, and how.
        model: The draft.
        cache: The draft's cache.
        last_two, own_length: As for `DraftPhase.run`, but ids of the target.
    """
    last_two = last_two.clamp(max=model.vocab_size - 1)
    if isinstance(phase, Chain):
        chain = model.chain(last_two.numel(), phase.head)
        if chain is not None:
            return phase.run_at_once(chain, last_two, own_length, cache)
    step = partial(model.step, cache=cache, scores=phase.scores, head=phase.head)
    return phase.run(step, last_two, own_length, cache)
