"""Random numbers of a run, and tokens drawn with them."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec import ops
from lvspec.config import DecodeConfig
from lvspec.phases.logits import LogitsProcessors, sampling_warpers

_DRAFTS, _TESTS, _DRAWS = range(3)

# The constants of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), as signed numbers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


class Sampler:
    """Uniforms for every sequence of a batch.

    They are functions of the seed, the index of the request, the iteration and the slot, and of
    nothing else: a sequence gets what it gets alone, whoever its neighbours are. No generator with
    a state is involved, so nothing waits for the host.

    Args:
        config: Has temperature, top-k, top-p and seed. Without a seed one is drawn from torch's
            global generator, which `torch.manual_seed` sets.
        batch_size: Places.
        num_slots: Slots of a verify pass at most.
        device: Where the run takes place.
    """

    def __init__(
        self, config: DecodeConfig, *, batch_size: int, num_slots: int, device: torch.device
    ) -> None:
        self._warpers = LogitsProcessors(sampling_warpers(config))
        seed = config.seed
        if seed is None:
            seed = int(torch.randint(2**62, (1,)))
        self._seed = _mix(torch.tensor(seed, dtype=torch.int64, device=device) * _STEP)
        self._keys = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._iterations = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._shape = (batch_size, 3, num_slots)
        self._counters = torch.arange(3 * num_slots, device=device) * _STEP
        self._uniforms = torch.zeros(self._shape, device=device)

    def begin(self, place: int, index: int) -> Tensor:
        """The request `index` takes this place; the uniform of its first token, float32 `[1, 1]`"""
        self._keys[place] = _mix(self._seed + torch.full_like(self._seed, index + 1) * _STEP)
        self._iterations[place] = 1
        return _uniforms(_mix(self._keys[place])).view(1, 1)

    def advance(self) -> None:
        """Uniforms for the next iteration."""
        rows = _mix(self._keys + self._iterations * _STEP)
        self._uniforms = _uniforms(_mix(rows[:, None] + self._counters)).view(self._shape)
        self._iterations += 1

    @property
    def drafts(self) -> Tensor:
        """float32 `[B, S]`: column t draws the token of slot t + 1."""
        return self._uniforms[:, _DRAFTS]

    @property
    def tests(self) -> Tensor:
        """float32 `[B, S]`: column t tests the token of slot t."""
        return self._uniforms[:, _TESTS]

    @property
    def draws(self) -> Tensor:
        """float32 `[B, S]`: column r draws the target's token of row r."""
        return self._uniforms[:, _DRAWS]

    def warp(self, logits: Tensor) -> Tensor:
        """Rows of the draft, `[B, S, V]`, at the temperature and within top-k and top-p."""
        return self._warpers.rows(logits.flatten(0, 1)).view(logits.shape)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token from every row: the lowest id at which the running sum passes the uniform.

    Args:
        logits: `[B, S, V]`; what `softmax` makes of a row is its distribution.
        uniforms: float32 `[B, S]` in [0, 1).

    Returns:
        int64 `[B, S]`; of a row with a NaN or without a finite maximum, the first maximum.
    """
    rows = logits.flatten(0, 1)[:, None]
    # A chain of a root alone: its bonus token is a sample of its row.
    root = torch.zeros(rows.shape[:2], dtype=torch.int64, device=logits.device)
    ones = torch.ones(rows.shape[0], dtype=torch.int32, device=logits.device)
    drawn = ops.accept_sampled(rows, None, root, ones, uniforms.reshape(-1, 1))
    return drawn.bonus_id.view(logits.shape[:2])


def draw_coupled(
    logits: Tensor,
    draft_logits: Tensor,
    tokens: Tensor,
    num_slots: Tensor,
    tests: Tensor,
    draws: Tensor,
) -> Tensor:
    """One token from every row of a chain, which is the drafted one as often as can be.

    Rejection sampling (Leviathan, Kalman and Matias, ICML 2023) in every row: the drafted token if
    it passes its test, otherwise one from what remains of the target's distribution. Each token by
    itself is a sample of its row.

    Args:
        logits: `[B, S, V]`, the target's.
        draft_logits: `[B, S - 1, Vd]`, row r is what `tokens[:, r + 1]` was drawn from.
        tokens: int64 `[B, S]`, slot 0 the root.
        num_slots: int32 `[B]`; the row of the last slot has no drafted token.
        tests, draws: float32 `[B, S]` in [0, 1), as of `Sampler`.

    Returns:
        int64 `[B, S]`.
    """
    batch_size, slots, vocabulary = logits.shape
    last = draw(logits[:, -1:], draws[:, -1:])
    if slots == 1:
        return last
    # Every row as a chain of its own: a root and the token drafted behind it. What the second row
    # would add is not used, so it may be any.
    rows = logits[:, :-1].reshape(-1, 1, vocabulary).expand(-1, 2, -1)
    drafted = tokens[:, 1:]
    is_drafted = torch.arange(1, slots, device=tokens.device) < num_slots[:, None]
    result = ops.accept_sampled(
        rows,
        draft_logits.flatten(0, 1)[:, None],
        torch.stack([tokens[:, :-1], drafted], dim=-1).flatten(0, 1),
        (is_drafted.int() + 1).flatten(),
        torch.stack([draws[:, :-1], tests[:, 1:]], dim=-1).flatten(0, 1),
    )
    passed = result.num_accepted.view(batch_size, -1) == 1
    return torch.cat([torch.where(passed, drafted, result.bonus_id.view_as(drafted)), last], dim=1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer of int64, whose products wrap around like unsigned ones."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted right as if unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _uniforms(x: Tensor) -> Tensor:
    """The upper 24 bits as a float32 in [0, 1)."""
    return _shifted(x, 40).float() * 2.0**-24
