"""Engine: a batch of sequences, each in its place, and one iteration over all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lvspec.config import DecodeConfig
from lvspec.engine.errors import NonFiniteLogits
from lvspec.engine.graph import IterationRunner, make_runner, models_obstacle
from lvspec.engine.length import GammaChoice
from lvspec.engine.mailbox import Mailbox, Report
from lvspec.engine.result import Trace
from lvspec.engine.roles import Roles
from lvspec.engine.sequence import Launched, Request, Sequence
from lvspec.engine.stats import DecodeStats
from lvspec.engine.stopping import Stopping
from lvspec.models.cache import SlotCache
from lvspec.models.model import Model
from lvspec.ops import Rules
from lvspec.phases.defaults import eos_ids_of
from lvspec.phases.draft import Drafter
from lvspec.phases.iteration import Iteration
from lvspec.phases.logits import LogitsProcessors
from lvspec.phases.needs import Needs
from lvspec.phases.outcome import Outcome
from lvspec.phases.relevance import get_scorer
from lvspec.phases.sampling import Sampler, draw
from lvspec.phases.state import DecodeState
from lvspec.policy import AcceptancePolicy
from lvspec.reference.append import NO_NAN


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
        policy: Which draft tokens may be accepted, where a request does not say it itself.
        config: How to run.
        batch_size: Places.
        processors: Applied to the target's rows before anything else looks at them; None: none.
            They include what temperature, top-k and top-p of `config` do.
        stopping: Criteria asked after every token; None: none.
        choice: Why the drafter's chains are as long as they are; None: that was said.

    Attributes:
        iteration: The method, run by this engine's clock.
        ended: Sequences that have ended, for the caller to take.
        runner: Says by its `description` how iterations are run.
    """

    def __init__(
        self,
        target: Model,
        drafter: Drafter,
        policy: AcceptancePolicy,
        config: DecodeConfig,
        *,
        batch_size: int = 1,
        processors: LogitsProcessors | None = None,
        stopping: Stopping | None = None,
        choice: GammaChoice | None = None,
    ) -> None:
        self.target, self.drafter, self.config = target, drafter, config
        self.choice = choice
        self.processors = LogitsProcessors() if processors is None else processors
        self.stopping = Stopping() if stopping is None else stopping
        self.places: list[Sequence | None] = [None] * batch_size
        self.ended: deque[Sequence] = deque()
        self.num_slots = drafter.gamma + 1
        self._eos_ids = eos_ids_of(target, policy, config)
        self.policy = self._usable(policy)
        self._scorer = get_scorer(config.scorer)
        self.cache: SlotCache | None = None
        sampler = None
        if config.samples:
            sizes = {"batch_size": batch_size, "num_slots": self.num_slots}
            sampler = Sampler(config, **sizes, device=target.device)
        reason = "a logits processor looks at earlier tokens"
        obstacle = reason if self.processors.need_paths else None
        lag = (1 if target.device.type == "cuda" else 0) if config.lag is None else config.lag
        # What processors look at must be known on the host.
        self._lag = 0 if obstacle else lag
        self._roles = Roles(target, drafter)
        self.runner: IterationRunner[Outcome] = make_runner(
            self._roles.models, capture=config.capture, obstacle=obstacle
        )
        self._is_timed = True
        self._allocations = 0
        self._found = True
        self._launched: deque[Launched] = deque()
        self.state = DecodeState(
            batch_size=batch_size,
            max_new_tokens=config.max_new_tokens,
            num_slots=self.num_slots,
            rules=Rules.of([self.policy] * batch_size, self._eos_ids, target.device),
            regret_dtype=torch.float64 if target.text.dtype == torch.float64 else torch.float32,
            sampler=sampler,
        )
        needs = Needs.of([self.policy])
        if config.trace:
            needs = needs.traced(target.vocab_size)
        self.iteration = Iteration(target, drafter, needs, self.processors, None, self.state)
        self._meet(needs)

    def _usable(self, policy: AcceptancePolicy) -> AcceptancePolicy:
        """With the end-of-sequence ids of this engine; strict where there is nothing to judge."""
        if self.drafter.gamma == 0:
            policy = AcceptancePolicy.strict()
        return replace(policy, eos_ids=self._eos_ids)

    def _meet(self, needs: Needs) -> None:
        """Iterations compute what these needs are, from the next on; none is under way."""
        wants_scores = self.drafter.gamma > 0 and (needs.relevance or needs.trace)
        self.iteration.needs = needs
        self.iteration.scorer = self._scorer if wants_scores else None
        # Where no token depends on what was drafted a pass may leave out what is found.
        is_certain = not needs.loose and not self.config.samples
        on_cpu = self.target.device.type == "cpu"
        self._finds_late = self.drafter.finds and is_certain and not on_cpu
        self._mailbox = Mailbox(
            batch_size=len(self.places),
            num_slots=self.num_slots,
            parts=1 if not needs.loose else 2 + needs.relevance,
            device=self.target.device,
            size=self._lag + 1,
        )

    def _widen(self, policy: AcceptancePolicy) -> None:
        """Iterations compute what this policy needs too; a graph is captured anew if that is more.

        What is under way is looked at before, so results may end here.
        """
        needs = self.iteration.needs | Needs.of([policy])
        if needs == self.iteration.needs:
            return
        while self._launched:
            self._look()
        self.state.make_room(needs.strict_ids)
        self._meet(needs)
        self._allocations += 1

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
        for model in self._roles.models:
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
        place, prompt = self.free_place, request.prompt
        stats = DecodeStats(
            self.target.device,
            self.drafter.gamma,
            depth=self.drafter.depth,
            generation_config=self.processors.applied,
            gamma_choice=None if self.choice is None else self.choice.to_dict(),
        )
        trace = Trace(place) if self.config.trace else None
        sequence = Sequence(request, place, stats, trace, self.stopping)
        self.places[place] = sequence
        try:
            policy = self.policy if request.policy is None else self._usable(request.policy)
            self._widen(policy)
            with self._roles.reading(request.inputs, stats):
                self.reserve(prompt.shape[1])
                stats.parts = self.parts
                begun = {"beginning": request.beginning(self.active)}
                logits = self.target.prefill(
                    request.inputs, self.cache, place, following=self._following, **begun
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
                    request.draft_inputs, place, prompt=prompt, target_cache=self.cache, **begun
                )
                if self.processors:
                    self.processors.begin(place, prompt)
                    logits = self.processors.rows(logits, [prompt[0]], [place])
                first = self._first_token(sequence, logits)
                is_text = (self.cache.visual[place] == 0).all()
                self.state.begin(place, prompt[0, -1:], first, policy, is_text)
                flags = torch.stack([logits.isnan().any(), self.state.finished[place], is_text])
                is_nan, is_finished, is_text, token = torch.cat([flags.long(), first]).tolist()
                stats.is_gated, stats.is_text = policy.needs_relevance, bool(is_text)
                stats.is_calibrating = policy.is_calibrating
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
        return self._roles.parts()

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
        with self._roles.held():
            self._settle()
            with self.target.active(), self.drafter.active():
                yield

    def _settle(self) -> None:
        """Iterations are run in a way that is right for the models as they are now."""
        if self._roles.have_changed():
            self.runner.obstacle = models_obstacle(self._roles.models)
        passes = self._roles.passes()
        for sequence in self.active:
            sequence.stats.passes = passes

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
        self.drafter.only_root = self._finds_late and not self._found
        kind = self.cache.plan is None, self.drafter.has_plan, self.drafter.only_root
        if self.runner.is_due((self._allocations, self._roles.revisions), kind):
            with self._phase("capture"):
                self._is_timed = False
                self.runner.capture(self.run_phases)
                self._is_timed = True
        if self.runner.is_captured:
            with self._phase("iteration"):
                done = self.runner.replay()
        else:
            done = self.run_phases()
        trace = done.trace_tensors() if self.config.trace else None
        self._launched.append(Launched(tuple(self.places), self.runner.is_warming_up, trace))
        self._mailbox.send(done.report)

    def _look(self) -> None:
        """At the oldest report, for the sequences that were there and have not ended since."""
        launched, reports = self._launched.popleft(), self._mailbox.receive()
        self._found = False
        for sequence, report in zip(launched.sequences, reports, strict=True):
            if sequence is not None and not sequence.is_over:
                self._found |= report.num_found > 0
                self._take(sequence, report, launched)

    def _take(self, sequence: Sequence, report: Report, launched: Launched) -> None:
        stats = sequence.stats
        if report.nan_row != NO_NAN:
            self._fail(sequence, f"iteration {stats.num_iterations}, row {report.nan_row}")
            return
        stats.loop = self.runner.description
        if sequence.trace is not None:
            sequence.trace.add(launched.trace)
        is_stopped = sequence.take(report, is_warm_up=launched.is_warm_up)
        if report.finished or is_stopped:
            self._release(sequence)

    def run_phases(self) -> Outcome:
        """One iteration, see `Iteration.run`."""
        return self.iteration.run(self.cache, self._phase, self._committed)

    def _committed(self) -> list[Tensor | None]:
        """Of every place prompt and output, int64 `[T]`; None where there is no sequence."""
        return [None if sequence is None else sequence.ids(self.state) for sequence in self.places]

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Counts for every sequence under way; on a CUDA device by events."""
        if not self._is_timed:  # events of a graph tell no time
            yield
            return
        if self.runner.is_warming_up and name != "capture":
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
