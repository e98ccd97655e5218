"""What an iteration tells the host, and how that gets there without the device waiting."""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lvspec.reference.append import HEAD


@dataclass(frozen=True)
class Report:
    """One sequence behind one iteration.

    Attributes:
        num_out: Output tokens so far.
        finished: Whether an end of sequence or the last allowed token is among them.
        nan_row: The first row on the path whose logits had a NaN, or `NO_NAN`.
        num_accepted: Draft tokens accepted, those beyond `num_out` included.
        num_slots: Slots that were verified, the root included.
        num_found: Draft tokens that were looked up, verified or not; of a drafter that looks none
            up those that were verified.
        regret_used: Nats spent so far.
        tokens: What the iteration appended; those beyond `num_out` are no output.
        regrets: Of each of these its part of `regret_used`; empty where nothing may be loose.
        anchors: Whether each of these had an anchor's row; empty without a visual gate.
        threshold: Relevance from which on a row was an anchor; None without a visual gate.
    """

    num_out: int
    finished: bool
    nan_row: int
    num_accepted: int
    num_slots: int
    num_found: int
    regret_used: float
    tokens: list[int]
    regrets: list[float] = field(default_factory=list)
    anchors: list[bool] = field(default_factory=list)
    threshold: float | None = None

    @classmethod
    def of(cls, row: list[int], slots: int) -> Report:
        """From a row of `Outcome.report` for `slots` slots."""
        num_out, finished, nan_row, num_accepted, num_slots, regret = row[:HEAD]
        ends = range(HEAD + slots, len(row) + 1, slots)
        parts = [row[end - slots : end] for end in ends]
        tokens, regrets, anchors = (*parts, [], [])[:3]
        (threshold,) = _floats(row[-1:]) if anchors else (None,)
        return cls(
            num_out,
            bool(finished),
            nan_row,
            num_accepted,
            min(num_slots, slots),
            num_slots - 1,
            *_floats([regret]),
            tokens,
            _floats(regrets),
            [bool(anchor) for anchor in anchors],
            threshold,
        )


def _floats(bits: list[int]) -> list[float]:
    """The float64 numbers whose bits these are."""
    count = len(bits)
    return list(struct.unpack(f"={count}d", struct.pack(f"={count}q", *bits)))


class Mailbox:
    """Reports on their way to the host, the oldest first.

    Each is copied into pinned memory behind the iteration that made it, with an event behind the
    copy. To look at the oldest is to wait for its event alone: iterations that were launched since
    go on meanwhile.

    Args:
        batch_size, num_slots: Of the reports; one may have fewer slots.
        parts: Numbers that a report has for every slot: tokens, regrets, anchors; with these it
            has one more, see `commit`.
        device: Where they are made.
        size: Reports that are on their way at a time, at most.
    """

    def __init__(
        self, *, batch_size: int, num_slots: int, parts: int, device: torch.device, size: int
    ) -> None:
        on_cuda = device.type == "cuda"
        self._parts = parts
        shape = (size, batch_size * (HEAD + parts * num_slots + (parts == 3)))
        self._buffers = torch.zeros(shape, dtype=torch.int64, pin_memory=on_cuda).unbind(0)
        self._events = [torch.cuda.Event() if on_cuda else None for _ in range(size)]
        self._free = deque(range(size))
        self._sent: deque[tuple[int, Tensor]] = deque()

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, report: Tensor) -> None:
        """Copy a report, int64 `[B, HEAD + parts * S]`, when the device comes to it.

        Raises:
            IndexError: There are `size` reports on their way.
        """
        entry = self._free.popleft()
        held = self._buffers[entry][: report.numel()].view_as(report)
        held.copy_(report, non_blocking=True)
        if self._events[entry] is not None:
            self._events[entry].record()
        self._sent.append((entry, held))

    def receive(self) -> list[Report]:
        """The oldest report, one entry a sequence, as soon as it is there.

        Raises:
            IndexError: There is none.
        """
        entry, held = self._sent.popleft()
        if self._events[entry] is not None:
            self._events[entry].synchronize()
        rows = held.tolist()
        self._free.append(entry)
        slots = (held.shape[1] - HEAD) // self._parts
        return [Report.of(row, slots) for row in rows]
