"""One request under way: what the host knows of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lvspec.engine.mailbox import Report
from lvspec.engine.result import Generation, Trace
from lvspec.engine.stats import DecodeStats
from lvspec.engine.stopping import Stopping
from lvspec.models.cache import Beginning
from lvspec.phases.outcome import Traced
from lvspec.phases.state import DecodeState
from lvspec.policy import AcceptancePolicy


@dataclass(frozen=True, eq=False)
class Shared:
    """What several prompts begin with, all that replaces pixels included.

    Attributes:
        length: Tokens, fewer than any of these prompts has.
    """

    length: int


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        inputs: What the target's processor returns for it, checked.
        draft_inputs: What the draft's processor returns; None without a draft that reads it.
        index: Which of the requests it is, from 0.
        number: Which of all that its engine was given, from 0; its samples depend on that.
        tokenizer: For `Generation.text`.
        streamer: Gets the prompt, then tokens as they are committed.
        policy: Which draft tokens may be accepted; None: the engine's.
        shared: The very object of other requests that begin alike, with the same pixels; None: no
            other does.
    """

    inputs: Mapping[str, Any]
    draft_inputs: Mapping[str, Any] | None = None
    index: int = 0
    number: int = 0
    tokenizer: PreTrainedTokenizerBase | None = None
    streamer: BaseStreamer | None = None
    policy: AcceptancePolicy | None = None
    shared: Shared | None = None

    @property
    def prompt(self) -> Tensor:
        """int64 `[1, T]`."""
        return self.inputs["input_ids"]

    def beginning(self, sequences: Iterable[Sequence]) -> Beginning | None:
        """Where one of these sequences, each in its place, has read what this prompt begins with.

        (Rows of a prompt stay as they are for as long as its sequence is there.)
        """
        if self.shared is None:
            return None
        for other in sequences:
            if other.request.shared is self.shared and other.request is not self:
                return Beginning(other.place, self.shared.length)
        return None


class Sequence:
    """A request in a place of the batch.

    Attributes:
        place: Which.
        stats, trace: Of this request alone.
        stopping: Criteria asked after every token.
        tokens: Output so far, as the host knows it; what the device has beyond is not shown.
        anchors: Whether each of these had an anchor's row; none without a gate.
        is_over: Whether its place is no longer its own.
        error: What ended the sequence, if that was an error.
        generation: The result, once the sequence has ended without an error.
    """

    def __init__(
        self,
        request: Request,
        place: int,
        stats: DecodeStats,
        trace: Trace | None,
        stopping: Stopping,
    ) -> None:
        self.request, self.place = request, place
        self.stats, self.trace, self.stopping = stats, trace, stopping
        self.tokens: list[int] = []
        self.anchors: list[bool] = []
        self.is_over = False
        self.error: Exception | None = None
        self.generation: Generation | None = None

        self._prompt: Tensor | None = None
        if stopping or request.streamer is not None:
            self._prompt = request.prompt[0].cpu()

    @property
    def count(self) -> int:
        """Output tokens so far."""
        return len(self.tokens)

    def ids(self, state: DecodeState) -> Tensor:
        """int64 `[T + n]` on the device: prompt and output."""
        return torch.cat([self.request.prompt[0], state.out_ids[self.place, : self.count]])

    def take(self, report: Report, *, is_warm_up: bool) -> bool:
        """An iteration gave more output: `advance`, and count what is shown of it.

        Args:
            report: Of the iteration.
            is_warm_up: Whether its time counts as warm-up.

        Returns:
            As `advance`.
        """
        return self.advance(report.tokens[: report.num_out - self.count], report, is_warm_up)

    def advance(
        self, tokens: list[int], report: Report | None = None, is_warm_up: bool = False
    ) -> bool:
        """There are more output tokens: stream them, up to where a criterion stops.

        The prompt is streamed before the first of them.

        Returns:
            Whether a criterion stops the sequence; tokens behind that are not shown.
        """
        before, kept = self.count, None
        if self.stopping and tokens:
            output = torch.tensor(self.tokens + tokens, dtype=torch.int64)
            ids = torch.cat([self._prompt, output])
            kept = self.stopping.first_stop(ids, len(output), len(tokens))
        tokens = tokens[:kept]
        self.tokens += tokens
        # A neighbour's gate may have had rows looked at that decide nothing here.
        is_gated = report is not None and self.stats.is_gated
        anchors = report.anchors[: len(tokens)] if is_gated else [False] * len(tokens)
        self.anchors += anchors
        if report is not None:  # before a streamer can interrupt
            shown = len(tokens)
            self.stats.add(
                report.num_accepted,
                report.num_slots,
                max(report.regret_used - sum(report.regrets[shown:]), 0.0),
                num_tokens=shown,
                num_anchors=sum(anchors),
                threshold=report.threshold,
                is_warm_up=is_warm_up,
            )
        streamer = self.request.streamer
        if streamer is not None and before == 0:
            streamer.put(self._prompt)
        if streamer is not None and tokens:
            streamer.put(torch.tensor(tokens, dtype=torch.int64))
        return kept is not None

    @property
    def ending(self) -> Generation | Exception:
        """What it ended with."""
        return self.generation if self.error is None else self.error

    def finish(self, state: DecodeState) -> None:
        """The place will be another's: keep the result."""
        if self.error is None:
            self.generation = self.result(state)
            if self.request.streamer is not None:
                self.request.streamer.end()

    def result(self, state: DecodeState) -> Generation:
        """What there is so far; ordinary tensors, for a caption may become a label in training."""
        prompt, place = self.request.prompt, self.place
        with torch.inference_mode(False):
            if self.count == 0:  # not begun: what the place holds is another's
                tokens = prompt[:, :0].clone()
                kinds, relevance = tokens.to(torch.uint8), tokens.float()
            else:
                tokens, kinds, relevance = (
                    output[place : place + 1, : self.count].clone()
                    for output in (state.out_ids, state.out_kinds, state.out_relevance)
                )
                self.stats.close(kinds[0])
            return Generation(
                torch.cat([prompt, tokens], dim=1),
                tokens,
                kinds,
                relevance,
                self.stats,
                self.trace,
                self.request.tokenizer,
                self.request.index,
                torch.tensor([self.anchors], dtype=torch.bool),
            )


@dataclass(frozen=True)
class Launched:
    """An iteration on whose report the host has not looked: whose it is, and for their traces.

    Attributes:
        sequences: In their places.
        is_warm_up: Whether its time counts as warm-up.
        trace: What traces keep, see `Outcome.trace_tensors`; None where there are none.
    """

    sequences: tuple[Sequence | None, ...]
    is_warm_up: bool
    trace: Traced | None
