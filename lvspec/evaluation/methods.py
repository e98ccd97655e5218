"""Ways to caption that can stand beside each other: our own loop, and HF's `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from lvspec.config import DecodeConfig
from lvspec.engine.decoder import Decoder
from lvspec.engine.result import Generation
from lvspec.models.families import check_family
from lvspec.phases.draft import DraftChoice
from lvspec.policy import AcceptancePolicy
from lvspec.video.processor import HFProcessor, Processor


class Prompt(Protocol):
    """What a method captions: a processor's inputs, and the draft's where those differ."""

    inputs: Mapping[str, Tensor]
    draft_inputs: Mapping[str, Tensor] | None


class Models(Protocol):
    """A target, who drafts for it, and the target's processor; a `Pair` is one."""

    @property
    def target(self) -> PreTrainedModel: ...
    @property
    def draft(self) -> DraftChoice: ...
    @property
    def processor(self) -> Processor | HFProcessor: ...


@dataclass
class Output:
    """One caption by one method.

    Attributes:
        text: The caption.
        seconds: Wall time from inputs to tokens, prefill included, decoding of the file not.
        ids: New tokens.
        passes: Forward passes of the target behind the prefill.
        prefill_seconds: Of `seconds` those until the first token; None where the first pass does
            more, as HF's does with an assistant.
        regret: Nats lost by loose tokens, 0 for lossless methods.
        generation: The whole result, for methods that are ours.
        cache: Of methods that are HF's, the cache they had: "dynamic" or "static".
    """

    text: str
    seconds: float
    ids: list[int]
    passes: int
    prefill_seconds: float | None = None
    regret: float = 0.0
    generation: Generation | None = None
    cache: str | None = None

    @property
    def tokens(self) -> int:
        """How many new tokens there are."""
        return len(self.ids)

    @property
    def parts(self) -> dict[str, dict[str, int]]:
        """As `DecodeStats.parts`; none for methods that are not ours."""
        return {} if self.generation is None else self.generation.stats.parts

    @property
    def decode_seconds(self) -> float | None:
        """Of `seconds` without the prefill; None where that is not known."""
        return None if self.prefill_seconds is None else self.seconds - self.prefill_seconds


_ROOM = 16  # positions

P = TypeVar("P", bound=Prompt)
Method = Callable[[P], Output]


def lvspec_method(
    models: Models,
    policy: AcceptancePolicy | None,
    config: DecodeConfig,
    *,
    draft: Literal["self", "ngram"] | None = None,
) -> Method:
    """`lvspec.Decoder` under a policy; None is autoregression. `draft` in place of the models'."""
    drafter = None if policy is None else (draft or models.draft)
    return decoder_method(
        Decoder(models.target, drafter, policy, config, tokenizer=models.processor.tokenizer)
    )


def decoder_method(decoder: Decoder, policy: AcceptancePolicy | None = None) -> Method:
    """What this decoder, which has a tokenizer, says of a prompt; under this policy or its own."""

    def run(prompt: Prompt) -> Output:
        start = time.perf_counter()
        result = decoder.generate(prompt.inputs, draft_inputs=prompt.draft_inputs, policy=policy)
        seconds = time.perf_counter() - start
        stats = result.stats
        return Output(
            result.text,
            seconds,
            result.tokens[0].tolist(),
            stats.num_iterations,
            stats.seconds["prefill"],
            stats.regret,
            result,
        )

    return run


def huggingface_method(
    models: Models,
    *,
    max_new_tokens: int,
    assisted: bool,
    cache: Literal["dynamic", "static"] = "dynamic",
) -> Method:
    """HF's own greedy `generate`, alone or with the draft as assistant.

    Args:
        models: With a draft model, where it is to assist.
        max_new_tokens: Tokens at most.
        assisted: Whether the draft assists.
        cache: "static" where transformers allows it: with an assistant from 5.24 on. Before that
            it is "dynamic" all the same; `Output.cache` says what it was.
    """
    target, tokenizer = models.target, models.processor.tokenizer
    text_model = check_family(target.config.model_type, "target").text_model(target)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}
    if assisted:
        options["assistant_model"] = models.draft
        if vocabulary_size(models.draft) != vocabulary_size(target):
            # HF takes vocabularies that are padded differently for different ones.
            options |= {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer}

    def generate(inputs: Mapping[str, Tensor], cache: str) -> tuple[list[int], _Clock]:
        clock = _Clock(target.device)
        if cache == "static":
            # Static passes are compiled on a GPU, where a hook would cut them into pieces.
            options["stopping_criteria"] = StoppingCriteriaList([clock.is_done])
            options["cache_implementation"] = "static"
            # transformers 5.24 makes room for one token too few where an assistant drafts the last.
            longest = inputs["input_ids"].shape[1] + max_new_tokens
            options["max_cache_len"] = longest + _ROOM
            sequences = target.generate(**inputs, **options)
        else:
            handle = text_model.register_forward_hook(clock.count)
            try:
                sequences = target.generate(**inputs, **options)
            finally:
                handle.remove()
        ids = sequences[0, inputs["input_ids"].shape[1] :].tolist()
        clock.stop()
        return ids, clock

    has = cache

    def run(prompt: Prompt) -> Output:
        nonlocal has
        try:
            ids, clock = generate(prompt.inputs, has)
        except ValueError as error:
            if has == "dynamic" or "Static cache" not in str(error):
                raise
            has = "dynamic"
            for name in ("stopping_criteria", "cache_implementation", "max_cache_len"):
                del options[name]
            ids, clock = generate(prompt.inputs, has)
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        # The prefill is one call; with an assistant it verifies the first draft too.
        passes = clock.calls if assisted else clock.calls - 1
        first = None if assisted else clock.first
        return Output(text, clock.seconds, ids, passes, first, cache=has)

    return run


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the model's head."""
    return model.config.get_text_config(decoder=True).vocab_size


class _Clock:
    """Counts the passes of a model that HF's `generate` makes, and times the first and all."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = time.perf_counter()
        self.calls, self.first, self.seconds = 0, 0.0, 0.0

    def count(self, *_: object) -> None:
        self.calls += 1
        if self.calls == 1:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.first = time.perf_counter() - self._start

    def is_done(self, ids: Tensor, scores: object, **_: object) -> Tensor:
        """As a stopping criterion that never stops."""
        self.count()
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._start


class EvaluationInterrupted(KeyboardInterrupt):
    """Ctrl-C while captioning. `results` holds what is complete."""

    def __init__(self, results: Any) -> None:
        super().__init__()
        self.results = results


class Turn(NamedTuple):
    """One caption of a run.

    Attributes:
        index: Of the prompt.
        method: By name.
        output: What the method returned, or an error that does not end the run.
        warm_up: Seconds of a caption beforehand that does not count; None where there was none.
    """

    index: int
    method: str
    output: Any
    warm_up: float | None


def in_turns(
    methods: Mapping[str, Callable[[P], Any]],
    prompts: Iterable[P],
    *,
    is_wanted: Callable[[int, str], bool] = lambda index, method: True,
    errors: tuple[type[Exception], ...] = (),
) -> Iterator[Turn]:
    """Caption every prompt by every method.

    The methods take turns on each prompt, in an order that rotates, so that a slow spell of the
    machine falls on all of them. Before its first caption a method makes one that does not count:
    what is planned, compiled and captured once is in it.

    Args:
        methods: By name.
        prompts: One after the other; each is read when its turn comes.
        is_wanted: Whether a method (by name) is to caption a prompt (by index).
        errors: What ends a caption and not the run: it comes in place of the output.
    """
    names, warm = list(methods), set()
    for index, prompt in enumerate(prompts):
        shift = index % len(names)
        wanted = [name for name in names[shift:] + names[:shift] if is_wanted(index, name)]
        seconds = {}
        for name in wanted:  # all of them before the first that counts
            if name not in warm:
                with suppress(*errors):
                    seconds[name] = _warm_up(methods[name], prompt)
        warm |= seconds.keys()
        for name in wanted:
            try:
                output = methods[name](prompt)
            except errors as error:
                output = error
            yield Turn(index, name, output, seconds.get(name))


def _warm_up(method: Callable[[P], Any], prompt: P) -> float:
    start = time.perf_counter()
    method(prompt)
    return time.perf_counter() - start
