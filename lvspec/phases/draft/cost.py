"""What a chain of drafted tokens is worth: the cost model of speculative decoding.

If every drafted token is accepted with the same chance a, a pass of the target over a chain of g
tokens gives `1 + a + ... + a^g` tokens, the bonus token included. It costs `verify_ratio` passes of
the target and g steps of the draft at `cost_ratio` passes each. (Leviathan, Kalman and Matias, ICML
2023.) What passes cost is best measured (`lvspec/engine/pace.py`). Where that cannot be done:
decoding at small batches is bound by the bytes that passes move, so the ratio of those of the
weights is a fair `cost_ratio`, and a pass over a few rows costs hardly more than one over a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec.tree import MAX_SLOTS

MOST = MAX_SLOTS - 1
"""Draft tokens of a pass at most."""


def expected_tokens(acceptance: float, gamma: int) -> float:
    """tau: tokens for each pass of the target over a chain of `gamma`, the bonus token included.

    Worked example: at an acceptance of 0.5 and gamma 2, 1 + 0.5 + 0.25 = 1.75.

    Raises:
        ValueError: `acceptance` is no probability, or `gamma` not from 0 to 63.
    """
    return speedup(acceptance, gamma, cost_ratio=0.0)


def speedup(
    acceptance: float,
    gamma: int,
    cost_ratio: float,
    verify_ratio: float = 1.0,
    row_ratio: float = 0.0,
) -> float:
    """Tokens in the time of one, over autoregression.

    Args:
        acceptance: Chance that a drafted token is accepted, if those before it are.
        gamma: Draft tokens of a chain, 0 to 63.
        cost_ratio: A step of the draft in passes of the target over one row, >= 0.
        verify_ratio: A pass of the target over the chain in passes over one row, > 0, but for what
            each row adds.
        row_ratio: What each further row of the target adds, in passes over one row, >= 0.

    Raises:
        ValueError: A number is out of range; names it.
    """
    if not 0 <= gamma <= MOST:
        raise ValueError(f"gamma: expected 0 to {MOST}, got {gamma}")
    return float(_speedups(acceptance, cost_ratio, gamma, verify_ratio, row_ratio)[gamma])


def best_gamma(
    acceptance: float,
    cost_ratio: float,
    most: int = MOST,
    verify_ratio: float = 1.0,
    row_ratio: float = 0.0,
) -> int:
    """The chain with the largest `speedup`, of 1 to `most` tokens; the shorter of two as good.

    Worked example: at an acceptance of 0.9, a draft of a tenth of the target is worth 10 tokens.

    Raises:
        ValueError: A number is out of range; names it.
    """
    if not 1 <= most <= MOST:
        raise ValueError(f"most: expected 1 to {MOST}, got {most}")
    found = _speedups(acceptance, cost_ratio, most, verify_ratio, row_ratio)
    return int(found[1:].argmax()) + 1


def text_costs(
    acceptance: float, gamma: int, most: int, cost_ratio: float, row_ratio: float, piece: int = 0
) -> Tensor:
    """What texts of 0 to `most` tokens are expected to cost, in passes of the target over one row.

    Unlike `speedup`, this knows that texts end: a chain that reaches beyond costs as much as any.

    Worked example: where all is accepted and nothing but passes costs anything, a text of 10 tokens
    takes two passes at gamma 4 and at gamma 8, and one at gamma 9.

    Args:
        acceptance, gamma, cost_ratio, row_ratio: As for `speedup`.
        most: Tokens of the longest text, >= 0.
        piece: A chain that reaches beyond the end is drafted to the end alone, in pieces of so many
            steps; 0: it is drafted whole.

    Returns:
        float64 `[most + 1]`.
    """
    chance = torch.tensor([acceptance], dtype=torch.float64)
    some = chance ** torch.arange(gamma) * (1 - chance)  # 0 to gamma - 1 of the chain are accepted
    costs = torch.zeros(most + 1, dtype=torch.float64)
    for left in range(1, most + 1):
        steps = gamma if piece == 0 else min(gamma, -(-left // piece) * piece)
        costs[left] = 1 + row_ratio * gamma + cost_ratio * steps
        reach = min(gamma, left - 1)
        costs[left] += some[:reach] @ costs[left - reach : left].flip(0)
        if reach == gamma:
            costs[left] += acceptance**gamma * costs[left - gamma - 1]
    return costs


def _speedups(
    acceptance: float, cost_ratio: float, most: int, verify_ratio: float, row_ratio: float
) -> Tensor:
    """Of chains of 0 to `most` tokens, float64 `[most + 1]`."""
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance: expected a probability, got {acceptance}")
    if not 0 <= cost_ratio < float("inf"):
        raise ValueError(f"cost_ratio: expected a number >= 0, got {cost_ratio}")
    if not 0 < verify_ratio < float("inf"):
        raise ValueError(f"verify_ratio: expected a number > 0, got {verify_ratio}")
    if not 0 <= row_ratio < float("inf"):
        raise ValueError(f"row_ratio: expected a number >= 0, got {row_ratio}")
    chance = torch.tensor([acceptance], dtype=torch.float64)
    lengths = torch.arange(most + 1)
    tokens = (chance**lengths).cumsum(-1)
    return tokens / (verify_ratio + (cost_ratio + row_ratio) * lengths)
