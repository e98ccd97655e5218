"""generate and generate_many: prompts in, captions out, sooner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from lvspec.config import DecodeConfig
from lvspec.draft import DraftChoice, draft_model, make_drafter
from lvspec.engine import Engine, NonFiniteLogits
from lvspec.inputs import check_inputs
from lvspec.models import Model
from lvspec.policy import AcceptancePolicy
from lvspec.processors import Processors, sampling_warpers
from lvspec.sequence import Request
from lvspec.stopping import Stopping
from lvspec.trace import Generation

__all__ = ["GenerationInterrupted", "NonFiniteLogits", "generate", "generate_many"]

Inputs = Mapping[str, Any]


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C while generating. `generations` holds what was generated and not yet returned.

    Attributes:
        generations: In the order of the requests, those that had begun.
    """

    def __init__(self, generations: list[Generation]) -> None:
        count = sum(generation.tokens.shape[1] for generation in generations)
        super().__init__(f"interrupted after {count} tokens")
        self.generations = generations

    @property
    def generation(self) -> Generation:
        """The first of them; there is one whenever a single prompt was interrupted."""
        return self.generations[0]


@overload
def generate(
    target: PreTrainedModel, draft: DraftChoice, inputs: Inputs, **kwargs: Any
) -> Generation: ...
@overload
def generate(
    target: PreTrainedModel, draft: DraftChoice, inputs: Sequence[Inputs], **kwargs: Any
) -> list[Generation]: ...
def generate(
    target: PreTrainedModel,
    draft: DraftChoice,
    inputs: Inputs | Sequence[Inputs],
    *,
    policy: AcceptancePolicy | None = None,
    config: DecodeConfig | None = None,
    draft_inputs: Inputs | Sequence[Inputs] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: BaseStreamer | Sequence[BaseStreamer] | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    stop_strings: str | Sequence[str] | None = None,
) -> Generation | list[Generation]:
    """Generate with the target, sooner.

    The target's choice is its largest logit, or with `DecodeConfig(temperature=...)` a sample. With
    `AcceptancePolicy.strict()` the tokens are HF's greedy ones, or distributed as HF's samples. (Up
    to near ties: a block of rows rounds differently from one row, so where two logits differ by
    rounding alone, less than 1e-4 in float32, the other token may be taken. In bfloat16 and float16
    this happens more often.) A looser policy measures on the rows as they are sampled from.

    The target's generation config is not looked at, but for its end-of-sequence ids: what it
    says of sampling, penalties or lengths is given here, or by HF's own `generate` with
    `custom_generate=lvspec.custom_generate`.

    Args:
        target: HF model of a supported family (`lvspec.families.FAMILIES`), unchanged.
        draft: A smaller model with the same tokenizer, on the same device. "self": the target
            drafts for itself, with `DecodeConfig.draft_keep` of the video. "ngram": what followed
            the last tokens before, in prompt or output, is proposed again. None generates token by
            token: plain autoregression over the same cache.
        inputs: What the target's processor returns for one prompt: `input_ids` `[1, T]`, pixels,
            grids. Or a list of those, one entry a prompt: they are decoded together, each with its
            own length and acceptance, and give what each gives alone.
        policy: Which draft tokens may be accepted; None is `AcceptancePolicy.lvspec()`, for n-grams
            `AcceptancePolicy.strict()`, which gives the target's own tokens: what an n-gram
            proposes no model has found fitting, so there is no reason to take it loosely.
        config: How to draft and run; None is `DecodeConfig()`.
        draft_inputs: The prompt, or prompts, as the draft's processor returns them, where that
            differs; nobody reads it where no draft model does.
        tokenizer: For `Generation.text` and `stop_strings`.
        streamer: An HF streamer: gets the prompt, then tokens as they are committed. None is ever
            taken back. For several prompts a list of them.
        logits_processor: HF's logits processors, or functions of (input_ids, scores): applied to
            every row of the target, in order, before `config`'s temperature, top-k and top-p. Those
            that look at earlier tokens get prompt, output and the drafted tokens before the row, of
            one sequence at a time, without padding. The draft knows nothing of them.
        stopping_criteria: HF's stopping criteria, asked after every token of every sequence by
            itself, before the token is streamed.
        stop_strings: A sequence ends with the token that completes one of these, as in HF; the
            string remains in the output.

    Returns:
        The tokens, what kind each is, and statistics; a list where `inputs` is one.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it, what was expected and
            what came. That includes logits processors that keep state from token to token.
        NonFiniteLogits: The target's logits were NaN; carries what was generated.
        GenerationInterrupted: Ctrl-C; carries what was generated.
    """
    is_batch = isinstance(inputs, (list, tuple))
    prompts = list(inputs) if is_batch else [inputs]
    if not prompts:
        return []
    draft_prompts = _one_each("draft_inputs", draft_inputs, len(prompts), is_batch)
    streamers = _one_each("streamer", streamer, len(prompts), is_batch)
    decoder = Decoder(
        target,
        draft,
        policy,
        config,
        batch_size=len(prompts),
        logits_processor=logits_processor,
        stopping=Stopping(stopping_criteria, stop_strings, tokenizer),
    )
    requests = [
        decoder.request(*each, index=index, tokenizer=tokenizer)
        for index, each in enumerate(zip(prompts, draft_prompts, streamers, strict=True))
    ]
    decoder.engine.reserve(max(request.prompt.shape[1] for request in requests))
    generations = list(decoder.run(iter(requests), ordered=True, return_exceptions=False))
    return generations if is_batch else generations[0]


def generate_many(
    target: PreTrainedModel,
    draft: DraftChoice,
    inputs: Iterable[Inputs],
    *,
    batch_size: int = 8,
    policy: AcceptancePolicy | None = None,
    config: DecodeConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    stop_strings: str | Sequence[str] | None = None,
    ordered: bool = True,
    return_exceptions: bool = False,
) -> Iterator[Generation | Exception]:
    """Generate for any number of prompts, `batch_size` at a time.

    A prompt is taken from `inputs` when a place is free for it, so they may be made on the way, and
    each gives what `generate` gives for it alone.

    Args:
        target, draft, policy, config, tokenizer: As for `generate`.
        logits_processor, stopping_criteria, stop_strings: As for `generate`.
        inputs: Prompts, each what a processor returns for one; or pairs of the target's and the
            draft's, where their processors differ.
        batch_size: Places, >= 1.
        ordered: Whether results come in the order of `inputs`; if not, as they are completed, and
            `Generation.index` says which is which.
        return_exceptions: What becomes of a prompt that is refused (TypeError, ValueError) or whose
            logits are NaN (NonFiniteLogits). True: the exception comes in place of the result, with
            an attribute `index`, and the others go on. False: it is raised when its turn comes.

    Yields:
        One result a prompt.

    Raises:
        TypeError, ValueError, NonFiniteLogits, GenerationInterrupted: As `generate`.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
    if isinstance(inputs, Mapping):
        raise TypeError("inputs: expected prompts one after the other, got a single one")
    decoder = Decoder(
        target,
        draft,
        policy,
        config,
        batch_size=batch_size,
        logits_processor=logits_processor,
        stopping=Stopping(stopping_criteria, stop_strings, tokenizer),
    )

    def requests() -> Iterator[Request | Exception]:
        for index, each in enumerate(inputs):
            pair = each if isinstance(each, tuple) else (each, None)
            try:
                yield decoder.request(*pair, None, index=index, tokenizer=tokenizer)
            except (TypeError, ValueError) as error:
                error.index = index
                yield error

    return decoder.run(requests(), ordered=ordered, return_exceptions=return_exceptions)


class Decoder:
    """An engine, and the requests that go through it.

    Args:
        target, draft, policy, config, logits_processor: As for `generate`.
        batch_size: Places.
        stopping: Criteria asked after every token.
        warps: Whether temperature, top-k and top-p of `config` are applied to the target's rows;
            False if `logits_processor` has them already.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: DraftChoice,
        policy: AcceptancePolicy | None,
        config: DecodeConfig | None,
        *,
        batch_size: int,
        logits_processor: LogitsProcessorList | None = None,
        stopping: Stopping | None = None,
        warps: bool = True,
    ) -> None:
        config = DecodeConfig() if config is None else config
        if policy is None:
            is_ngram = isinstance(draft, str) and draft == "ngram"
            policy = AcceptancePolicy.strict() if is_ngram else AcceptancePolicy.lvspec()
        _check_type("config", config, DecodeConfig)
        _check_type("policy", policy, AcceptancePolicy)
        self.target = Model(target, "target", capture=config.capture)
        self.draft = draft_model(draft, capture=config.capture)
        chosen = draft if self.draft is None else self.draft
        drafter = make_drafter(self.target, chosen, config, policy.eos_ids)
        processors = Processors(
            () if logits_processor is None else logits_processor,
            sampling_warpers(config) if warps else (),
            batch_size=batch_size,
        )
        self.engine = Engine(
            self.target,
            drafter,
            policy,
            config,
            batch_size=batch_size,
            processors=processors,
            stopping=stopping,
        )

    def request(
        self,
        inputs: Inputs,
        draft_inputs: Inputs | None,
        streamer: BaseStreamer | None,
        *,
        index: int,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Request:
        found = check_inputs(self.target, inputs)
        if self.draft is not None:
            draft_inputs = check_inputs(
                self.draft, inputs if draft_inputs is None else draft_inputs
            )
        else:
            draft_inputs = None
        return Request(found, draft_inputs, index, tokenizer, streamer)

    @torch.inference_mode()
    def run(
        self, requests: Iterator[Request | Exception], *, ordered: bool, return_exceptions: bool
    ) -> Iterator[Generation | Exception]:
        """Results of all requests."""
        waiting: dict[int, Generation | Exception] = {}
        following = 0
        for index, result in self._completed(requests, waiting):
            waiting[index] = result
            while (following in waiting) if ordered else waiting:
                index = following if ordered else next(iter(waiting))
                result = waiting.pop(index)
                following += 1
                if isinstance(result, Exception) and not return_exceptions:
                    raise result
                yield result

    def _completed(
        self,
        requests: Iterator[Request | Exception],
        waiting: Mapping[int, Generation | Exception],
    ) -> Iterator[tuple[int, Generation | Exception]]:
        """(index, result) of every request, as they are completed."""
        engine = self.engine
        try:
            while True:
                while engine.free_place is not None:
                    request = next(requests, None)
                    if request is None:
                        break
                    if isinstance(request, Exception):
                        yield request.index, request
                        continue
                    try:
                        engine.admit(request)
                    except ValueError as error:
                        error.index = request.index
                        yield request.index, error
                if engine.active and not engine.ended:
                    with engine.attention():
                        while not engine.ended:
                            engine.iterate()
                if not engine.ended:
                    return
                while engine.ended:
                    # Taken off only when it is handed on: nothing is lost in between.
                    sequence = engine.ended[0]
                    yield sequence.request.index, sequence.outcome
                    engine.ended.popleft()
        except KeyboardInterrupt:
            raise GenerationInterrupted(self._so_far(waiting)) from None

    def _so_far(self, waiting: Mapping[int, Generation | Exception]) -> list[Generation]:
        """What was generated and not returned, by request."""
        found = dict(waiting)
        for sequence in self.engine.ended:
            found[sequence.request.index] = sequence.outcome
        for sequence in self.engine.active:
            found[sequence.request.index] = sequence.result(self.engine.state)
        kept = (found[index] for index in sorted(found))
        return [result for result in kept if isinstance(result, Generation)]


def _one_each(name: str, value: Any, count: int, is_batch: bool) -> list[Any]:
    """One entry for each of `count` prompts."""
    if value is None:
        return [None] * count
    if is_batch != isinstance(value, (list, tuple)):
        expected = f"a list of {count}, one a prompt" if is_batch else "one, for a single prompt"
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    values = list(value) if is_batch else [value]
    if len(values) != count:
        raise ValueError(f"{name}: expected {count} entries, one a prompt, got {len(values)}")
    return values


def _check_type(name: str, value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"{name}: expected {expected.__name__}, got {value!r}")
