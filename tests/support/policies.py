"""Policies for models with random weights."""

from typing import Any

import torch

from lvspec.ops import Rules
from lvspec.phases.state import DecodeState
from lvspec.policy import AcceptancePolicy

STRICT = AcceptancePolicy.strict()


def gated(anchor_threshold: float, **fields: Any) -> AcceptancePolicy:
    """Anchors strictly, elsewhere the five best, right tokens off by two: no limit on regret.

    What a random draft proposes costs a random target many nats, so that nothing would be loose
    within the limits of `AcceptancePolicy.lvspec()`.
    """
    given = {"top_k": 5, "shift_window": 2, "name": "gated", **fields}
    return AcceptancePolicy(anchor_threshold=anchor_threshold, **given)


def strict_rules(batch_size: int, eos_ids: list[int]) -> Rules:
    """Of sequences that accept exact matches alone."""
    return Rules.of([STRICT] * batch_size, eos_ids, torch.get_default_device())


def begin(state: DecodeState, place: int, last: int, first: int) -> None:
    """A strict sequence behind a prompt that ends with `last`; its first token is `first`."""
    state.begin(place, torch.tensor([last]), torch.tensor([first]), STRICT, torch.tensor(False))
