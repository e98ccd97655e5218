"""Engine: a batch of sequences, each in its place, and one iteration over all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lvspec.accept import accept
from lvspec.attention import lvspec_attention_on
from lvspec.cache import SlotCache
from lvspec.commit import NO_NAN, commit
from lvspec.config import DecodeConfig
from lvspec.draft import Draft, Drafter
from lvspec.models import Model
from lvspec.ops import Acceptance
from lvspec.policy import AcceptancePolicy
from lvspec.processors import Processors
from lvspec.relevance import get_scorer
from lvspec.sampling import Sampler, draw
from lvspec.sequence import Request, Sequence
from lvspec.state import DecodeState
from lvspec.stats import DecodeStats
from lvspec.stopping import Stopping
from lvspec.trace import Generation, Trace
from lvspec.verify import Verification, verify


class NonFiniteLogits(RuntimeError):
    """The target's logits were NaN. `generation` holds what was generated before."""

    index = 0  # which of the requests

    def __init__(self, message: str, generation: Generation) -> None:
        super().__init__(message)
        self.generation = generation


@dataclass(frozen=True)
class Iteration:
    """What an iteration leaves on the device.

    Attributes:
        draft: What was verified.
        acceptance: What stood.
        wanted: int32 `[B, S]`, the target's choice at each slot.
        relevance: float32 `[B, S]`, or None where it was not computed.
        report: int32 `[B, 3]`, see `commit`.
    """

    draft: Draft
    acceptance: Acceptance
    wanted: Tensor
    relevance: Tensor | None
    report: Tensor


class Engine:
    """Decodes up to `batch_size` sequences at a time.

    Every sequence is prefilled by itself into its place, without padding; one that ends leaves its
    place to the next. Lengths and acceptances differ from place to place.

    Args:
        target: The target.
        drafter: Who proposes.
        policy: Which draft tokens may be accepted.
        config: How to run.
        batch_size: Places.
        processors: Applied to the target's rows before anything else looks at them; None: none.
            They include what temperature, top-k and top-p of `config` do.
        stopping: Criteria asked after every token; None: none.

    Attributes:
        ended: Sequences that have ended, for the caller to take.
    """

    def __init__(
        self,
        target: Model,
        drafter: Drafter,
        policy: AcceptancePolicy,
        config: DecodeConfig,
        *,
        batch_size: int = 1,
        processors: Processors | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        self.target, self.drafter, self.config = target, drafter, config
        self.processors = Processors() if processors is None else processors
        self.stopping = Stopping() if stopping is None else stopping
        self.places: list[Sequence | None] = [None] * batch_size
        self.ended: deque[Sequence] = deque()
        self.num_slots = drafter.gamma + 1
        eos_ids = config.eos_ids
        if eos_ids is None:
            eos_ids = policy.eos_ids or target.eos_ids
        if drafter.gamma == 0:
            policy = AcceptancePolicy.strict()  # nothing to be loose about
        self.policy = replace(policy, eos_ids=eos_ids)
        scorer = get_scorer(config.scorer)
        wants_scores = drafter.gamma > 0 and (policy.needs_relevance or config.trace)
        self.scorer = scorer if wants_scores else None
        self.cache: SlotCache | None = None
        sampler = None
        if config.samples:
            sampler = Sampler(
                config,
                batch_size=batch_size,
                num_slots=self.num_slots,
                device=target.device,
            )
        self.state = DecodeState(
            batch_size=batch_size,
            max_new_tokens=config.max_new_tokens,
            num_slots=self.num_slots,
            eos_ids=torch.tensor(eos_ids, dtype=torch.int64, device=target.device),
            regret_dtype=torch.float64 if target.text.dtype == torch.float64 else torch.float32,
            sampler=sampler,
        )

    @property
    def active(self) -> list[Sequence]:
        """The sequences that are not finished."""
        return [sequence for sequence in self.places if sequence is not None]

    @property
    def free_place(self) -> int | None:
        """A place without a sequence, if there is one."""
        return self.places.index(None) if None in self.places else None

    def reserve(self, prompt_length: int) -> None:
        """Room in the caches for a prompt, what is generated and one draft behind it.

        Raises:
            ValueError: `cache_capacity` is less than that.
        """
        count = self.config.max_new_tokens
        needed = prompt_length + count + self.num_slots
        fixed = self.config.cache_capacity
        if fixed is not None and fixed < needed:
            raise ValueError(
                f"cache_capacity: expected at least {needed} (a prompt of {prompt_length}, "
                f"max_new_tokens={count}, {self.num_slots} slots), got {fixed}"
            )
        capacity = fixed or needed
        batch_size = len(self.places)
        if self.cache is None:
            self.cache = self.target.new_cache(
                batch_size=batch_size, capacity=capacity, num_slots=self.num_slots
            )
        elif capacity > self.cache.capacity:
            capacity = max(capacity, self.cache.capacity * 5 // 4)  # requests differ a little
            self.cache.grow(capacity)
        else:
            return
        self.drafter.allocate(batch_size=batch_size, capacity=capacity)

    def admit(self, request: Request) -> None:
        """Prefill a request into a free place; its first token is there afterwards.

        Raises:
            ValueError: The prompt does not fit, or the draft's is of another length.
        """
        place = self.free_place
        prompt = request.prompt
        stats = DecodeStats(self.target.device, self.drafter.gamma, place, depth=self.drafter.depth)
        trace = Trace(place) if self.config.trace else None
        sequence = Sequence(request, place, stats, trace, self.stopping)
        self.places[place] = sequence
        try:
            with stats.timer.phase("prefill"):
                self.reserve(prompt.shape[1])
                logits = self.target.prefill(request.inputs, self.cache, place)
                if request.draft_inputs is not None:
                    # One length counts the rows of both caches.
                    length = request.draft_inputs["input_ids"].shape[1]
                    if length != prompt.shape[1]:
                        raise ValueError(
                            f"draft_inputs: expected a prompt of {prompt.shape[1]} tokens like the "
                            f"target's, got {length}"
                        )
                self.drafter.prefill(
                    request.draft_inputs, place, prompt=prompt, target_cache=self.cache
                )
                if self.processors:
                    logits = self.processors.rows(logits, [prompt[0]])
                first = self._first_token(sequence, logits)
                is_nan = logits.isnan().any()
                self.state.begin(place, prompt[0, -1:], first)
                is_nan, is_finished = torch.stack([is_nan, self.state.finished[place]]).tolist()
        except Exception:
            self.places[place] = None
            raise
        if is_nan:
            self._fail(sequence, "the prompt")
            return
        is_stopped = sequence.advance(self.state, 1)
        if is_finished or is_stopped:
            self._release(sequence)

    def _first_token(self, sequence: Sequence, logits: Tensor) -> Tensor:
        """int64 `[1]`, by the last row of the prompt, `[1, V]`."""
        sampler = self.state.sampler
        if sampler is None:
            return logits[0].argmax(keepdim=True)
        return draw(logits[None], sampler.begin(sequence.place, sequence.request.index))[0]

    @contextmanager
    def attention(self) -> Iterator[None]:
        """`iterate` is called within this context, prompts are admitted outside."""
        with ExitStack() as stack:
            stack.enter_context(lvspec_attention_on(self.target.text))
            stack.enter_context(self.drafter.active())
            yield

    def iterate(self) -> None:
        """Draft, verify, accept, commit: at least one more token for every sequence."""
        done = self.run_phases()
        report = done.report.tolist()
        for sequence in self.active:
            count, is_finished, nan_row = report[sequence.place]
            if nan_row != NO_NAN:
                self._fail(sequence, f"iteration {sequence.stats.num_iterations}, row {nan_row}")
                continue
            sequence.stats.record(done.acceptance.num_accepted, done.draft.shape.num_slots)
            if sequence.trace is not None:
                sequence.trace.record(done.draft, done.wanted, done.relevance, done.acceptance)
            is_stopped = sequence.advance(self.state, count)
            if is_finished or is_stopped:
                self._release(sequence)

    def run_phases(self) -> Iteration:
        """One iteration on the device; nothing of it is read back.

        (By this loop. A logits processor may, and on a CPU some drafters look where they can stop.)
        """
        state, cache = self.state, self.cache
        with self._phase("draft"):
            if state.sampler is not None:
                state.sampler.advance()
            draft = self.drafter.propose(state, cache.kv_len)
        with self._phase("verify"):
            verification = verify(self.target, cache, draft, self.scorer)
        with self._phase("accept"):
            verification = self._processed(verification, draft)
            acceptance, logit_stats = accept(
                verification,
                draft,
                self.policy,
                state.regret_used,
                cache.workspace,
                state.sampler,
            )
        with self._phase("commit"):
            relevance = verification.relevance
            self.drafter.commit(draft, acceptance, cache.kv_len)
            report = commit(state, cache, draft, acceptance, relevance, logit_stats.lse)
        return Iteration(draft, acceptance, logit_stats.top_ids[..., 0], relevance, report)

    def _processed(self, verification: Verification, draft: Draft) -> Verification:
        """With the rows as the logits processors leave them."""
        if not self.processors:
            return verification
        committed = []
        if self.processors.need_paths:
            committed = [
                None if sequence is None else sequence.ids(self.state) for sequence in self.places
            ]
        shape = draft.shape
        logits = self.processors.slots(
            verification.logits, draft.tokens, shape.ancestors, shape.num_slots, committed
        )
        return replace(verification, logits=logits)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Counts for every sequence under way; on a CUDA device by events."""
        timers = [sequence.stats.timer for sequence in self.active]
        start = timers[0].now()
        yield
        end = timers[0].now()
        for timer in timers:
            timer.add(name, start, end)

    def _fail(self, sequence: Sequence, where: str) -> None:
        sequence.error = NonFiniteLogits(
            f"target: expected finite logits, got NaN at {where}; "
            f"{sequence.count} tokens were generated before",
            sequence.result(self.state),
        )
        sequence.error.index = sequence.request.index
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        sequence.finish(self.state)
        self.state.finish(sequence.place)
        self.places[sequence.place] = None
        self.ended.append(sequence)
