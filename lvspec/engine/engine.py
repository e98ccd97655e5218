"""Engine: a batch of sequences, each in its place, and one iteration over all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lvspec.config import DecodeConfig
from lvspec.engine.graph import GraphedLoop, make_loop, models_obstacle
from lvspec.engine.mailbox import Mailbox, Report
from lvspec.engine.result import Generation, Trace
from lvspec.engine.sequence import Launched, Request, Sequence
from lvspec.engine.stats import DecodeStats
from lvspec.engine.stopping import Stopping
from lvspec.models.cache import SlotCache
from lvspec.models.model import Model, held
from lvspec.ops import Acceptance, LogitStats
from lvspec.phases.accept import accept, regrets
from lvspec.phases.commit import commit
from lvspec.phases.defaults import eos_ids_of
from lvspec.phases.draft import CachedDrafter, Draft, Drafter
from lvspec.phases.iteration import Iteration
from lvspec.phases.logits import Processors
from lvspec.phases.relevance import get_scorer
from lvspec.phases.sampling import Sampler, draw
from lvspec.phases.state import DecodeState
from lvspec.phases.verify import Verification, verify
from lvspec.policy import AcceptancePolicy
from lvspec.reference.append import NO_NAN


class NonFiniteLogits(RuntimeError):
    """The target's logits were NaN. `generation` holds what was generated before."""

    index = 0  # which of the requests

    def __init__(self, message: str, generation: Generation) -> None:
        super().__init__(message)
        self.generation = generation

    def __reduce__(self) -> tuple[type[NonFiniteLogits], tuple[str, Generation], dict[str, Any]]:
        return type(self), (str(self), self.generation), vars(self)


class Engine:
    """Decodes up to `batch_size` sequences at a time.

    Every sequence is prefilled by itself into its place, without padding; one that ends leaves its
    place to the next. Lengths and acceptances differ from place to place.

    The host launches an iteration and looks at the report of an earlier one, `lag` iterations late,
    while the device goes on: it never waits within one. What a sequence got in iterations that were
    launched before its end was seen is not shown.

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
        loop: Says by its `description` how iterations are run.
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
        eos_ids = eos_ids_of(target, policy, config)
        if drafter.gamma == 0:
            policy = AcceptancePolicy.strict()  # nothing to be loose about
        self.policy = replace(policy, eos_ids=eos_ids)
        # Relevance from which on a row is an anchor; None: it decides nothing.
        gated = self.policy.needs_relevance
        self._threshold = self.policy.rule.anchor_threshold if gated else None
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
        obstacle = None
        if self.processors.need_paths:
            obstacle = "a logits processor looks at earlier tokens"
        lag = (1 if target.device.type == "cuda" else 0) if config.lag is None else config.lag
        # What processors look at must be known on the host.
        self._lag = 0 if obstacle else lag
        self._models = [target]
        if isinstance(drafter, CachedDrafter) and drafter.model is not target:
            self._models.append(drafter.model)
        self._revisions: tuple[int, ...] = ()
        self.loop: GraphedLoop[Iteration] = make_loop(
            self._models, capture=config.capture, obstacle=obstacle
        )
        self._is_timed = True
        self._allocations = 0
        self._launched: deque[Launched] = deque()
        self._mailbox = Mailbox(
            batch_size=batch_size,
            num_slots=self.num_slots,
            parts=1 if self.policy.is_exact else 2 + gated,
            device=target.device,
            size=self._lag + 1,
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
            ValueError: `cache_capacity` is less than that, or a model takes no sequence as long.
        """
        count = self.config.max_new_tokens
        needed = prompt_length + self._following
        for model in self._models:
            model.check_length(needed)
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
            if len(self.active) > 1:
                self.cache.grow(capacity)
            else:  # nothing is in it, so there need not be two of them for a while
                self.cache = None
                self.drafter.release()
                self.cache = self.target.new_cache(
                    batch_size=batch_size, capacity=capacity, num_slots=self.num_slots
                )
        else:
            return
        self._allocations += 1
        self.drafter.allocate(batch_size=batch_size, capacity=capacity)

    def admit(self, request: Request) -> None:
        """Prefill a request into a free place; its first token is there afterwards.

        Raises:
            ValueError: The prompt does not fit, or the draft's is of another length.
        """
        place = self.free_place
        prompt = request.prompt
        stats = DecodeStats(
            self.target.device,
            self.drafter.gamma,
            depth=self.drafter.depth,
            generation_config=self.processors.applied,
        )
        trace = Trace(place) if self.config.trace else None
        sequence = Sequence(request, place, stats, trace, self.stopping)
        self.places[place] = sequence
        try:
            with self._on_device(), held(self._models), stats.timer.phase("prefill"):
                self.reserve(prompt.shape[1])
                stats.parts = self.parts
                logits = self.target.prefill(
                    request.inputs, self.cache, place, following=self._following
                )
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
                    self.processors.begin(place, prompt)
                    logits = self.processors.rows(logits, [prompt[0]], [place])
                first = self._first_token(sequence, logits)
                self.state.begin(place, prompt[0, -1:], first)
                is_text = (self.cache.visual[place] == 0).all()
                self.state.is_text[place] = is_text
                flags = torch.stack([logits.isnan().any(), self.state.finished[place], is_text])
                is_nan, is_finished, is_text, token = torch.cat([flags.long(), first]).tolist()
                stats.is_gated, stats.is_text = self.policy.needs_relevance, bool(is_text)
        except Exception:
            self.places[place] = None
            raise
        if is_nan:
            self._fail(sequence, "the prompt")
            return
        is_stopped = sequence.advance([token])
        if is_finished or is_stopped:
            self._release(sequence)

    @property
    def parts(self) -> dict[str, dict[str, int]]:
        """As `DecodeStats.parts`, once there are caches."""
        found = {"target": self.target.parts(self.cache)}
        if isinstance(self.drafter, CachedDrafter):
            found["draft"] = self.drafter.model.parts(self.drafter.cache)
        return found

    @property
    def _following(self) -> int:
        """Positions behind a prompt: what is generated and one draft behind it."""
        return self.config.max_new_tokens + self.num_slots

    def _first_token(self, sequence: Sequence, logits: Tensor) -> Tensor:
        """int64 `[1]`, by the last row of the prompt, `[1, V]`."""
        sampler = self.state.sampler
        if sampler is None:
            return logits[0].argmax(keepdim=True)
        return draw(logits[None], sampler.begin(sequence.place, sequence.request.number))[0]

    @contextmanager
    def attention(self) -> Iterator[None]:
        """`iterate` is called within this context, prompts are admitted outside.

        The models are this thread's within it, and are found as they are when it is entered.
        """
        with ExitStack() as stack:
            stack.enter_context(self._on_device())
            stack.enter_context(held(self._models))
            self._settle()
            stack.enter_context(self.target.active())
            stack.enter_context(self.drafter.active())
            yield

    def _settle(self) -> None:
        """Iterations are run in a way that is right for the models as they are now."""
        revisions = tuple(model.watch.revision for model in self._models)
        if revisions != self._revisions:
            self._revisions = revisions
            self.loop.obstacle = models_obstacle(self._models)
        caches = [self.cache]
        if isinstance(self.drafter, CachedDrafter):
            caches.append(self.drafter.cache)
        passes = {
            model.role: model.passes(cache)
            for model, cache in zip(self._models, caches, strict=False)
        }
        for sequence in self.active:
            sequence.stats.passes = passes

    def _on_device(self) -> AbstractContextManager:
        """Events and graphs are of the current device: it is the target's."""
        device = self.target.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def iterate(self) -> None:
        """Draft, verify, accept, commit: at least one more token for every sequence, some day.

        Launches an iteration, and looks at the report of the one `lag` iterations before. Where all
        that is missing is under way already, nothing is launched.
        """
        is_needed = any(self._is_open(sequence) for sequence in self.active)
        if is_needed:
            self._launch()
        if len(self._launched) > self._lag or not is_needed:
            self._look()

    def _is_open(self, sequence: Sequence) -> bool:
        """Whether iterations under way may leave something for another; each gives a token."""
        under_way = sum(sequence in launched.sequences for launched in self._launched)
        return sequence.count + under_way < self.config.max_new_tokens

    def _launch(self) -> None:
        """One iteration, by a graph if there is one, and its report on the way to the host."""
        if self.loop.is_due((self._allocations, self._revisions), self.cache.plan is None):
            with self._phase("capture"):
                self._is_timed = False
                self.loop.capture(self.run_phases)
                self._is_timed = True
        if self.loop.is_captured:
            with self._phase("iteration"):
                done = self.loop.replay()
        else:
            done = self.run_phases()
        trace = done.trace_tensors() if self.config.trace else None
        self._launched.append(Launched(tuple(self.places), self.loop.is_warming_up, trace))
        self._mailbox.send(done.report)

    def _look(self) -> None:
        """At the oldest report, for the sequences that were there and have not ended since."""
        launched, reports = self._launched.popleft(), self._mailbox.receive()
        for sequence, report in zip(launched.sequences, reports, strict=True):
            if sequence is not None and not sequence.is_over:
                self._take(sequence, report, launched)

    def _take(self, sequence: Sequence, report: Report, launched: Launched) -> None:
        stats = sequence.stats
        if report.nan_row != NO_NAN:
            self._fail(sequence, f"iteration {stats.num_iterations}, row {report.nan_row}")
            return
        stats.loop = self.loop.description
        if sequence.trace is not None:
            sequence.trace.record(*launched.trace)
        is_stopped = sequence.take(report, is_warm_up=launched.is_warm_up)
        if report.finished or is_stopped:
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
            processed = self._processed(verification, draft)
            acceptance, logit_stats = self._accept(processed, draft)
            costs = None
            if not self.policy.is_exact:
                costs = regrets(processed.logits, draft, logit_stats, acceptance)
        with self._phase("commit"):
            relevance = verification.relevance
            self.drafter.commit(draft, acceptance, cache.kv_len)
            report = commit(
                *(state, cache, draft, acceptance, relevance, logit_stats.lse),
                regrets=costs,
                anchor_threshold=self._threshold,
            )
        return Iteration(draft, acceptance, logit_stats.top_ids[..., 0], relevance, report)

    def _accept(self, verification: Verification, draft: Draft) -> tuple[Acceptance, LogitStats]:
        """Phase 3, on the device."""
        regret_used, sampler = self.state.regret_used, self.state.sampler
        is_strict = None if self._threshold is None else self.state.is_text
        return accept(
            *(verification, draft, self.policy, regret_used, self.cache.workspace),
            *(sampler, is_strict),
        )

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
        if not self._is_timed:  # events of a graph tell no time
            yield
            return
        if self.loop.is_warming_up and name != "capture":
            name = "warm-up"
        timers = [sequence.stats.timer for sequence in self.active]
        start = timers[0].now()
        yield
        end = timers[0].now()
        for timer in timers:
            timer.add(name, start, end)

    def abandon(self) -> None:
        """Give up every sequence under way, and those that have ended and were not taken."""
        for sequence in self.active:
            self._vacate(sequence)
        self.ended.clear()

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
        self._vacate(sequence)
        self.ended.append(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        sequence.is_over = True
        self.state.finish(sequence.place)
        self.places[sequence.place] = None
