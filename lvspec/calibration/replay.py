"""What a policy would have done, by rows that were recorded: no model is run.

The rule is the operations of the loop itself, `ops.gate` and `ops.accept`, given the recorded rows
of all clips at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lvspec import ops
from lvspec.calibration.contexts import Context, Contexts
from lvspec.phases.needs import TRACED_TOP_K
from lvspec.policy import AcceptancePolicy
from lvspec.reference.kinds import EXACT
from lvspec.rule import GATE_BINS


@dataclass
class Walk:
    """A caption as a policy would have given it.

    Attributes:
        tokens: Its output.
        iterations: Passes of the target.
        regret: Nats of all mismatches.
        mismatches: Tokens that were not the target's choice.
        guessed: Passes for which another context stood in, for their own was not recorded. Without
            any the walk is what a run does.
    """

    tokens: list[int]
    iterations: int = 0
    regret: float = 0.0
    mismatches: int = 0
    guessed: int = 0
    _at: Context | None = field(default=None, repr=False)

    @property
    def num_emitted(self) -> int:
        """Tokens that came from passes: all but the first, which is the prompt's."""
        return len(self.tokens) - 1


def replay(
    clips: Sequence[Contexts],
    policy: AcceptancePolicy,
    gamma: int,
    *,
    eos_ids: Iterable[int],
    max_new_tokens: int,
) -> list[Walk]:
    """Walk through every clip by chains of `gamma` tokens under `policy`.

    Args:
        clips: What was recorded of each; with a chain as long as `gamma` somewhere.
        policy: With `top_k` and `entropy_top` of at most the five that a trace keeps, and no chance
            in it.
        gamma: Drafted tokens of a pass, 1 to 63.
        eos_ids: End-of-sequence ids.
        max_new_tokens: Of a caption, at most.

    Raises:
        ValueError: The policy needs what a trace does not keep.
    """
    if policy.needed_top_k > TRACED_TOP_K:
        raise ValueError(
            f"top_k, entropy_top: expected at most {TRACED_TOP_K}, which a trace keeps, got "
            f"{policy.needed_top_k}"
        )
    if policy.random_share is not None:
        raise ValueError("random_share: expected none, which no recorded row decides, got one")
    eos_ids = sorted({*eos_ids, *policy.eos_ids})
    walks = [Walk([clip.first_token]) for clip in clips]
    for walk, clip in zip(walks, clips, strict=True):
        walk._at = clip.start.then(clip.first_token)
    rules = ops.Rules.of([policy] * len(clips), eos_ids, torch.device("cpu"))
    seen = torch.zeros(len(clips), GATE_BINS, dtype=torch.int32)
    while True:
        active = [
            i
            for i, walk in enumerate(walks)
            if walk.tokens[-1] not in eos_ids and len(walk.tokens) < max_new_tokens
        ]
        if not active:
            return walks
        chains = [_chain(clips[i], walks[i], gamma, eos_ids) for i in active]
        spent = [walks[i].regret - policy.regret_rate * len(walks[i].tokens) for i in active]
        index = torch.tensor(active)
        rows = _Rows(chains, [walks[i].tokens[-1] for i in active], [*eos_ids, *policy.strict_ids])
        numbers, counted = rules.numbers[index], seen[index]
        if policy.is_calibrating:
            numbers, counted = ops.gate(rows.relevance, rows.num_slots, numbers, counted)
            seen[index] = counted
        found = rows.accept(
            rules._replace(numbers=numbers, strict_ids=rules.strict_ids[index]), spent
        )
        for at, i in enumerate(active):
            _take(walks[i], chains[at], found, at, eos_ids, max_new_tokens)


def _chain(clip: Contexts, walk: Walk, gamma: int, eos_ids: Sequence[int]) -> list[Context]:
    """The contexts of the slots of a pass: the root's, and behind each drafted token."""
    tokens, chain, is_guess = list(walk.tokens), [], False
    context: Context | None = walk._at
    while True:
        # A draft stops behind an end of sequence: there is a row, and no proposal.
        is_last = len(chain) == gamma or (bool(chain) and context.token in eos_ids)
        if context.row is None or (context.proposal is None and not is_last):
            is_guess = True
            context = clip.nearest(tokens) or clip.start
            if context.row is None:
                raise ValueError("clips: expected clips with at least one traced pass, got none")
        chain.append(context)
        if is_last:
            break
        token = context.proposal.token
        tokens.append(token)
        context = context.then(token)
        if token in eos_ids and context.row is None:
            break  # nothing behind an end counts, and the draft may have stopped there
    walk.guessed += is_guess
    return chain


def _take(
    walk: Walk,
    chain: list[Context],
    found: ops.Acceptance,
    at: int,
    eos_ids: Sequence[int],
    max_new_tokens: int,
) -> None:
    """What a pass accepted is output."""
    count = int(found.num_accepted[at])
    walk.iterations += 1
    walk.regret += float(found.regret[at])
    walk.mismatches += int((found.kind[at, 1 : count + 1] != EXACT).sum())
    accepted = [chain[slot].proposal.token for slot in range(count)]
    if not (accepted and accepted[-1] in eos_ids):
        accepted.append(chain[count].row.top_ids[0])
    walk.tokens += accepted[: max_new_tokens - len(walk.tokens)]
    walk._at = chain[count].then(accepted[-1]) if len(accepted) > count else chain[count]


class _Rows:
    """A pass over a chain of each of several clips, as the tensors of the operations.

    Of the vocabulary only the tokens that occur are there, under numbers of their own.
    """

    def __init__(self, chains: list[list[Context]], roots: list[int], others: list[int]) -> None:
        slots = max(map(len, chains))
        padded = [chain + [chain[-1]] * (slots - len(chain)) for chain in chains]
        self.num_slots = torch.tensor([len(chain) for chain in chains], dtype=torch.int32)
        rows = [[context.row for context in chain] for chain in padded]
        self.relevance = torch.tensor([[row.relevance for row in each] for each in rows])
        entropy = torch.tensor([[row.entropy for row in each] for each in rows])
        top = torch.tensor([[row.top_log_probs for row in each] for each in rows])
        top_ids = torch.tensor([[row.top_ids for row in each] for each in rows])
        # Of the last slot there is no proposal, or one that is not looked at.
        proposals = [
            [context.proposal or (-1, float("-inf"), 0.0) for context in chain] for chain in padded
        ]
        drafted = torch.tensor([[proposal[0] for proposal in each] for each in proposals])
        own = torch.tensor([[proposal[1] for proposal in each] for each in proposals])
        tokens = torch.cat([torch.tensor(roots)[:, None], drafted[:, :-1]], dim=1)
        every = torch.cat([tokens.flatten(), top_ids.flatten(), torch.tensor([*others, -1])])
        self._ids = every.unique()
        self.tokens = self._number(tokens)
        logits = torch.full((len(chains), slots, len(self._ids)), float("-inf"))
        logits.scatter_(2, self._number(top_ids), top)
        logits[:, :-1].scatter_(2, self.tokens[:, 1:, None], own[:, :-1, None])
        self.logits = logits
        lse = torch.zeros(len(chains), slots).masked_fill(top[..., 0].isnan(), torch.nan)
        self.stats = ops.LogitStats(self._number(top_ids).int(), top, lse, entropy)

    def _number(self, ids: Tensor) -> Tensor:
        return torch.searchsorted(self._ids, ids)

    def accept(self, rules: ops.Rules, spent: list[float]) -> ops.Acceptance:
        """What stands; `spent` is the regret of each so far."""
        slots = self.tokens.shape[1]
        parents = torch.arange(-1, slots - 1, dtype=torch.int32).expand(len(self.tokens), slots)
        return ops.accept(
            self.logits,
            self.tokens,
            parents.contiguous(),
            self.num_slots,
            self.stats,
            self.relevance,
            rules._replace(
                strict_ids=self._number(rules.strict_ids), eos_ids=self._number(rules.eos_ids)
            ),
            regret_used=torch.tensor(spent, dtype=torch.float32),
        )
