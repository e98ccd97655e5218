"""Decoder: an engine for many calls, and the requests that go through it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count as numbers
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from lvspec.checks import check_count, check_type
from lvspec.config import DecodeConfig
from lvspec.engine.engine import Engine
from lvspec.engine.entries import LATE, Late, as_tuple, one_each
from lvspec.engine.errors import GenerationInterrupted
from lvspec.engine.gate import warn_of_gate
from lvspec.engine.keywords import refuse_keywords
from lvspec.engine.length import ChainLength, GammaChoice
from lvspec.engine.questions import about, shared_by
from lvspec.engine.result import Generation
from lvspec.engine.sequence import Request
from lvspec.engine.stopping import Stopping
from lvspec.engine.streams import ends_streamers
from lvspec.models.inputs import check_inputs
from lvspec.models.model import Model
from lvspec.phases.defaults import GenerationDefaults, eos_ids_of, usual_policy
from lvspec.phases.draft import DraftChoice, draft_model, make_drafter
from lvspec.phases.logits import LogitsProcessors, check_list, sampling_warpers
from lvspec.policy import AcceptancePolicy

Inputs = Mapping[str, Any]


class Decoder:
    """`generate` and `generate_many` for many calls: caches and CUDA graphs are kept in between.

    What one call needs beyond the models is made by the first call and used by all: keys and values
    of `batch_size` sequences, and on CUDA the graph of an iteration. Caches grow with the longest
    prompt, after which the graph is captured anew; `DecodeConfig(cache_capacity=...)` makes them
    large enough from the beginning. The models may change between calls. One call at a time; of
    several decoders that share a model, in several threads, one at a time uses it.

    Args:
        target, draft, policy, config, tokenizer: As for `generate`.
        logits_processor, stopping_criteria, stop_strings: As for `generate`.
        batch_size: Sequences that are decoded together, >= 1.
        warps: Whether temperature, top-k and top-p of `config` and the target's generation config
            (as it is now) are applied to the target's rows; False if `logits_processor` has them
            already.

    Raises:
        TypeError, ValueError: As `generate`.
        RuntimeError: A call begins while results of another are still to come.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: DraftChoice,
        policy: AcceptancePolicy | None = None,
        config: DecodeConfig | None = None,
        *,
        batch_size: int = 1,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        warps: bool = True,
        **unknown: Any,
    ) -> None:
        refuse_keywords(Decoder.__init__, unknown)
        check_count("batch_size", batch_size)
        config = DecodeConfig() if config is None else config
        if policy is None:
            policy = usual_policy(draft)
        check_type("config", config, DecodeConfig)
        check_type("policy", policy, AcceptancePolicy)
        stopping = Stopping(stopping_criteria, stop_strings, tokenizer)
        self.tokenizer = tokenizer
        self._given = target, draft
        self._policy, self._config, self._batch_size = policy, config, batch_size
        self._stopping = stopping
        self._processors_given, self._warps = check_list(logits_processor), warps
        self._numbers = numbers()
        self._busy = Lock()
        self._take_models()

    def _take_models(self) -> None:
        """Make everything for the models as they are now."""
        target, draft = self._given
        config = self._config
        self.target = Model(target, "target", fuse=config.fuse, cache_dtype=config.cache_dtype)
        self.draft = draft_model(draft, config)
        self._stopping.ranks = self.target.ranks
        ranks = self.target.ranks
        if ranks.size > 1 and config.samples and config.seed is None:  # one for all of them
            seed = ranks.value(int(torch.randint(2**62, (1,))))
            self._config = config = replace(config, seed=seed)
        self._taken = self._facts()
        self._processors = LogitsProcessors(
            self._processors_given,
            sampling_warpers(config) if self._warps else (),
            batch_size=self._batch_size,
            defaults=self._defaults() if self._warps and config.generation_config else None,
        )
        self._length = self._chain_length()
        self.engine = self._new_engine()

    def _chain_length(self) -> ChainLength | None:
        """What chooses how long chains are; None where that is said."""
        draft = "self" if self.draft is None else self.draft
        is_chain = self.draft is not None or self._given[1] == "self"
        if not (is_chain and self._config.chooses_gamma):
            return None
        return ChainLength(
            *(self.target, draft, self._policy, self._config), batch_size=self._batch_size
        )

    def _facts(self) -> list[tuple]:
        """What caches and heads were made for. (Whatever else changes is seen where it matters.)"""
        models = [model for model in (self.target, self.draft) if model is not None]
        return [
            (model.family.text_model(model.hf), model.hf.lm_head, model.text.dtype, model.device)
            for model in models
        ]

    def _defaults(self) -> GenerationDefaults | None:
        """What the target's generation config does to logits; None if that is nothing."""
        if self.target.hf.generation_config is None:
            return None
        eos_ids = eos_ids_of(self.target, self._policy, self._config)
        found = GenerationDefaults(
            self.target.hf, self._config, eos_ids=eos_ids, given=self._processors_given
        )
        return found if found.applied else None

    def _new_engine(self) -> Engine:
        draft = self._given[1] if self.draft is None else self.draft
        with torch.inference_mode(False), torch.no_grad():
            config, choice = self._config, None
            if self._length is not None:
                choice = self._choose()
                config = replace(config, gamma=choice.gamma)
            return Engine(
                self.target,
                make_drafter(self.target, draft, config, self._policy.eos_ids),
                self._policy,
                config,
                batch_size=self._batch_size,
                processors=self._processors,
                stopping=self._stopping,
                choice=choice,
            )

    def _choose(self) -> GammaChoice:
        """By the clock, which no two processes share."""
        return self.target.ranks.value(self._length.choose())

    def _take_length(self) -> None:
        """Chains are from now on as long as is found best now."""
        if self._length is None or self.engine.choice.is_settled:
            return
        choice = self._choose()
        if choice.gamma != self.engine.choice.gamma:
            self.engine = self._new_engine()
        self.engine.choice = choice

    @ends_streamers("streamer")
    def generate(
        self,
        inputs: Inputs | Sequence[Inputs],
        *,
        draft_inputs: Inputs | Sequence[Inputs] | None = None,
        streamer: BaseStreamer | Sequence[BaseStreamer] | None = None,
        policy: AcceptancePolicy | Sequence[AcceptancePolicy] | None = None,
        prompts: Sequence[Tensor] | None = None,
    ) -> Generation | list[Generation]:
        """As the function of this name; of a list, `batch_size` prompts are decoded at a time.

        A `policy`, or a list of them, one a prompt, takes the place of the decoder's.
        """
        asked = prompts
        if asked is not None:
            inputs = about(inputs, asked)
            if draft_inputs is not None:
                draft_inputs = about(draft_inputs, asked, "draft_inputs")
        is_batch = isinstance(inputs, (list, tuple))
        prompts = list(inputs) if is_batch else [inputs]
        if not prompts:
            return []
        draft_prompts = one_each("draft_inputs", draft_inputs, len(prompts), is_batch)
        streamers = one_each("streamer", streamer, len(prompts), is_batch)
        if isinstance(policy, AcceptancePolicy):
            policies: Sequence[AcceptancePolicy | None] = [policy] * len(prompts)
        else:
            policies = one_each("policy", policy, len(prompts), is_batch)
        requests = [
            self.request(*each, index=index)
            for index, each in enumerate(
                zip(prompts, draft_prompts, streamers, policies, strict=True)
            )
        ]
        if asked is not None:
            shared = shared_by(self.target, [request.prompt for request in requests])
            requests = [replace(request, shared=shared) for request in requests]
        longest = max(request.prompt.shape[1] for request in requests)
        run = self.run(iter(requests), ordered=True, return_exceptions=False, longest=longest)
        generations = list(run)
        return generations if is_batch else generations[0]

    def generate_many(
        self,
        inputs: Iterable[Inputs | None],
        *,
        ordered: bool = True,
        return_exceptions: bool = False,
    ) -> Iterator[Generation | Exception]:
        """As the function of this name."""
        if isinstance(inputs, Mapping):
            raise TypeError("inputs: expected prompts one after the other, got a single one")

        def requests() -> Iterator[Request | Exception | Late]:
            index = 0
            for each in inputs:
                if each is None:
                    yield LATE
                    continue
                try:
                    yield self._request_of(each, index)
                except (TypeError, ValueError) as error:
                    error.index = index
                    yield error
                index += 1

        return self.run(requests(), ordered=ordered, return_exceptions=return_exceptions)

    def _request_of(self, each: Any, index: int) -> Request:
        """Of an entry of `generate_many`'s inputs."""
        inputs, draft_inputs, policy = (*as_tuple(each), None, None)[:3]
        return self.request(inputs, draft_inputs, None, policy, index=index)

    def request(
        self,
        inputs: Inputs,
        draft_inputs: Inputs | None = None,
        streamer: BaseStreamer | None = None,
        policy: AcceptancePolicy | None = None,
        *,
        index: int = 0,
    ) -> Request:
        """A prompt for `run`, checked."""
        if policy is not None:
            check_type("policy", policy, AcceptancePolicy)
        number = next(self._numbers)
        found = check_inputs(self.target, inputs)
        if self.draft is not None:
            draft_inputs = check_inputs(
                self.draft, inputs if draft_inputs is None else draft_inputs
            )
        else:
            draft_inputs = None
        return Request(found, draft_inputs, index, number, self.tokenizer, streamer, policy)

    # A caller's inference mode ends here: its tensors are no use outside, and caches are kept.
    @torch.inference_mode(False)
    @torch.no_grad()
    def run(
        self,
        requests: Iterator[Request | Exception | Late],
        *,
        ordered: bool,
        return_exceptions: bool,
        longest: int | None = None,
    ) -> Iterator[Generation | Exception]:
        """Results of all requests.

        Args:
            requests: Taken when a place is free; `LATE` where the next is not there yet.
            ordered, return_exceptions: As for `generate_many`.
            longest: Tokens of the longest prompt, if that is known.
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("Decoder: expected one call at a time, got another in between")
        waiting: dict[int, Generation | Exception] = {}
        following = 0
        try:
            if self._facts() != self._taken:
                self._take_models()
            self._take_length()
            if longest is not None:
                self.engine.reserve(longest)
            for index, result in self._completed(requests, waiting):
                waiting[index] = result
                while (following in waiting) if ordered else waiting:
                    index = following if ordered else next(iter(waiting))
                    result = waiting.pop(index)
                    following += 1
                    if isinstance(result, Exception) and not return_exceptions:
                        raise result
                    yield result
        finally:
            self.engine.abandon()
            self._busy.release()

    def _completed(
        self,
        requests: Iterator[Request | Exception | Late],
        waiting: Mapping[int, Generation | Exception],
    ) -> Iterator[tuple[int, Generation | Exception]]:
        """(index, result) of every request, as they are completed."""
        engine = self.engine
        try:
            while True:
                request = None
                while engine.free_place is not None:
                    request = next(requests, None)
                    if request is None or request is LATE:
                        break
                    if isinstance(request, Exception):
                        yield request.index, request
                        continue
                    try:
                        engine.admit(request)
                    except ValueError as error:
                        error.index = request.index
                        yield request.index, error
                is_late = request is LATE
                if engine.active and not engine.ended:
                    with engine.attention():
                        while not engine.ended:
                            engine.iterate()
                            if is_late:
                                break
                if not engine.ended and not is_late:
                    return
                while engine.ended:
                    # Taken off only when it is handed on: nothing is lost in between.
                    sequence = engine.ended[0]
                    policy = sequence.request.policy or engine.policy
                    threshold = policy.anchor_threshold
                    warn_of_gate(self.target.hf, threshold, sequence.stats)
                    if self._length is not None:
                        self._length.learn(sequence.stats)
                    yield sequence.request.index, sequence.ending
                    engine.ended.popleft()
        except GeneratorExit:
            raise
        except BaseException as error:
            so_far = []
            self.target.ranks.fail(error)
            if isinstance(error, KeyboardInterrupt):
                so_far = self._so_far(waiting)
            if self.target.ranks.size == 1:  # the others would have to make one, too
                self.engine = self._new_engine()  # this one may have been stopped anywhere
            if isinstance(error, KeyboardInterrupt):
                raise GenerationInterrupted(so_far) from None
            raise

    def _so_far(self, waiting: Mapping[int, Generation | Exception]) -> list[Generation]:
        """What was generated and not returned, by request."""
        found = dict(waiting)
        for sequence in self.engine.ended:
            found[sequence.request.index] = sequence.ending
        for sequence in self.engine.active:
            found[sequence.request.index] = sequence.result(self.engine.state)
        kept = (found[index] for index in sorted(found))
        return [result for result in kept if isinstance(result, Generation)]
