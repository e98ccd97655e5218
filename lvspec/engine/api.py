"""generate and generate_many: prompts in, captions out, sooner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from lvspec.config import DecodeConfig
from lvspec.engine.decoder import Decoder, Inputs
from lvspec.engine.keywords import refuse_keywords
from lvspec.engine.result import Generation
from lvspec.engine.streams import ends_streamers
from lvspec.phases.draft import DraftChoice
from lvspec.policy import AcceptancePolicy


@overload
def generate(
    target: PreTrainedModel, draft: DraftChoice, inputs: Inputs, **kwargs: Any
) -> Generation: ...
@overload
def generate(
    target: PreTrainedModel, draft: DraftChoice, inputs: Sequence[Inputs], **kwargs: Any
) -> list[Generation]: ...
@ends_streamers("streamer")
def generate(
    target: PreTrainedModel,
    draft: DraftChoice,
    inputs: Inputs | Sequence[Inputs],
    *,
    policy: AcceptancePolicy | Sequence[AcceptancePolicy] | None = None,
    config: DecodeConfig | None = None,
    draft_inputs: Inputs | Sequence[Inputs] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: BaseStreamer | Sequence[BaseStreamer] | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    stop_strings: str | Sequence[str] | None = None,
    prompts: Sequence[Tensor] | None = None,
    **unknown: Any,
) -> Generation | list[Generation]:
    """Generate with the target, sooner.

    The target's choice is its largest logit, or with `DecodeConfig(temperature=...)` a sample. With
    `AcceptancePolicy.strict()` the tokens are HF's greedy ones, or distributed as HF's samples. (Up
    to near ties: a block of rows rounds differently from one row, so where two logits differ by
    rounding alone, less than 1e-4 in float32, the other token may be taken. In bfloat16 and float16
    this happens more often.) A looser policy measures on the rows as they are sampled from.

    What the target's generation config does to logits (a repetition penalty, bans, forced tokens,
    ...) is applied as HF's `generate` applies it, see `DecodeConfig.generation_config`. Whether to
    sample, how many tokens, and what stops besides an end of sequence are said here alone; HF's own
    `generate` with `custom_generate=lvspec.custom_generate` follows the generation config in these
    too.

    Args:
        target: HF model of a supported family (`lvspec.models.families.FAMILIES`), unchanged.
        draft: A smaller model with the same tokenizer, on the same device. "self": the target
            drafts for itself, with `DecodeConfig.draft_keep` of the video. "ngram": what followed
            the last tokens before, in prompt or output, is proposed again. None generates token by
            token: plain autoregression over the same cache.
        inputs: What the target's processor returns for one prompt: `input_ids` `[1, T]`, pixels,
            grids. Or a list of those, one entry a prompt: they are decoded together, each with its
            own length and acceptance, and give what each gives alone.
        policy: Which draft tokens may be accepted; None is `AcceptancePolicy.lvspec()`, for n-grams
            `AcceptancePolicy.strict()`, which gives the target's own tokens: what an n-gram
            proposes no model has found fitting, so there is no reason to take it loosely. For
            several prompts it may be a list, one a prompt.
        config: How to draft and run; None is `DecodeConfig()`.
        draft_inputs: The prompt, or prompts, as the draft's processor returns them, where that
            differs; nobody reads it where no draft model does.
        tokenizer: For `Generation.text` and `stop_strings`.
        streamer: An HF streamer: gets the prompt, then tokens as they are committed, and `end()`
            once, after an error too. No token is ever taken back. For several prompts a list of
            them.
        logits_processor: HF's logits processors, or functions of (input_ids, scores): applied to
            every row of the target, in order, behind what the generation config says and before
            `config`'s temperature, top-k and top-p. One that the generation config asks for too
            takes its place. Those
            that look at earlier tokens get prompt, output and the drafted tokens before the row, of
            one sequence at a time, without padding. The draft knows nothing of them.
        stopping_criteria: HF's stopping criteria, asked after every token of every sequence by
            itself, before the token is streamed. They get its ids on the CPU.
        stop_strings: A sequence ends with the token that completes one of these, which may begin in
            the prompt, as in HF; the string remains in the output.
        prompts: Several prompts about the clip of `inputs` (of one prompt, whichever), token ids
            int64 `[1, T]` each: what they begin with, the clip included, is read once, by target
            and draft; each gives what it gives alone. (A draft that keeps a part of the video reads
            it for each prompt, for each keeps another part.) `processor(video, [prompt, ...])`
            returns inputs with such ids.
        **unknown: None: a keyword that belongs to `config`, to `policy` or to HF's `generate` is
            refused with a word on where it goes.

    Returns:
        The tokens, what kind each is, and statistics; a list where `inputs` is one, or of
        `prompts`.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it, what was expected and
            what came. That includes logits processors that keep state from token to token,
            torch.autocast, and sequences longer than what a dynamic rotary embedding has one set of
            frequencies for.
        NonFiniteLogits: The target's logits were NaN; carries what was generated.
        GenerationInterrupted: Ctrl-C; carries what was generated.
    """
    refuse_keywords(generate, unknown)
    several = policy is not None and not isinstance(policy, AcceptancePolicy)
    each = inputs if prompts is None else prompts
    decoder = Decoder(
        target,
        draft,
        None if several else policy,
        config,
        batch_size=max(1, len(each)) if isinstance(each, (list, tuple)) else 1,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
    )
    return decoder.generate(
        inputs,
        draft_inputs=draft_inputs,
        streamer=streamer,
        policy=policy if several else None,
        prompts=prompts,
    )


def generate_many(
    target: PreTrainedModel,
    draft: DraftChoice,
    inputs: Iterable[Inputs | None],
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
    **unknown: Any,
) -> Iterator[Generation | Exception]:
    """Generate for any number of prompts, `batch_size` at a time.

    A prompt is taken from `inputs` when a place is free for it, so they may be made on the way, and
    each gives what `generate` gives for it alone.

    Args:
        target, draft, policy, config, tokenizer: As for `generate`.
        logits_processor, stopping_criteria, stop_strings: As for `generate`.
        inputs: Prompts, each what a processor returns for one; or pairs of the target's and the
            draft's, where their processors differ; or with a policy of its own behind these, as
            `(prompt, None, policy)`. None where the next one is not there yet: what is under way
            goes on, and after an iteration (at once, if nothing is) it is asked for again.
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
    refuse_keywords(generate_many, unknown)
    decoder = Decoder(
        target,
        draft,
        policy,
        config,
        batch_size=batch_size,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
    )
    return decoder.generate_many(inputs, ordered=ordered, return_exceptions=return_exceptions)
