"""custom_generate: lvspec inside HF's `generate`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from lvspec.config import DecodeConfig
from lvspec.engine.decoder import Decoder
from lvspec.engine.sequence import Request
from lvspec.engine.streams import ends_streamers
from lvspec.models.hf_names import caches_in
from lvspec.models.inputs import check_inputs
from lvspec.phases.draft import DraftChoice
from lvspec.policy import AcceptancePolicy
from lvspec.profile import Profile, ProfileSource

_INSTEAD = {
    "assistant_model": "draft_model=... and draft_inputs=...",
    "streamer": "lvspec_streamer=...",
    "synced_gpus": "nothing: every process decodes by itself",
}
_DECIDED_BY_HF = (
    *("max_new_tokens", "eos_ids", "temperature", "top_k", "top_p", "generation_config"),
)
_RETURNED_ONLY_BY_HF = (
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)
# Of the prepared arguments, what belongs to HF's own loop, besides its cache.
_OF_THE_LOOP = ("attention_mask", "use_cache", "logits_to_keep")


@ends_streamers("lvspec_streamer")
def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft_model: DraftChoice = None,
    draft_inputs: Mapping[str, Any] | None = None,
    lvspec_policy: AcceptancePolicy | None = None,
    lvspec_config: DecodeConfig | None = None,
    lvspec_profile: ProfileSource | None = None,
    lvspec_streamer: BaseStreamer | None = None,
    lvspec_tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | Sequence[str] | None = None,
    **prepared: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Generate as `lvspec.generate` does, called by HF's `generate`.

    `target.generate(**inputs, custom_generate=lvspec.custom_generate, draft_model=draft,
    draft_inputs=inputs, max_new_tokens=100)`. HF makes the first five arguments and `prepared` of
    its own, generation config included: lengths, end-of-sequence ids, sampling, penalties and all
    other logits processors and stopping criteria are honoured.

    Args:
        model: The target.
        input_ids: int64 `[1, T]`, without padding.
        logits_processor: All processors, those of temperature, top-k and top-p included.
        stopping_criteria: All criteria, those of length and end of sequence included.
        generation_config: What HF made of the model's, the given one and keyword arguments.
        draft_model: A smaller model with the same tokenizer, "self" or "ngram", as for
            `lvspec.generate`; None generates token by token.
        draft_inputs: The prompt as the draft's processor returns it: HF does not hand on the pixels
            that the target was given. Not needed for a prompt without image and video.
        lvspec_policy: What may be accepted; None is `AcceptancePolicy.lvspec()`.
        lvspec_config: How to draft and run. Lengths, end-of-sequence ids and sampling are HF's to
            say, and are left at their defaults here.
        lvspec_profile: What `lvspec calibrate` found for these models, a file or what is in it: the
            policy, and how to draft.
        lvspec_streamer: As `streamer` of `lvspec.generate`.
        lvspec_tokenizer: Finds `stop_strings`. (HF drops `tokenizer`.)
        stop_strings: As of `lvspec.generate`.
        **prepared: Positions, the vision tower's output and other arguments of the model's forward.

    Returns:
        int64 `[1, T + new]`; or with `return_dict_in_generate`, an object with that as `sequences`.

    Raises:
        TypeError, ValueError: Something is asked for that this cannot do, or that HF would not have
            handed on; the message names the argument and what is there instead.
    """
    _check_not_dropped()
    _check_generation_config(generation_config)
    _check_prompt(input_ids, prepared)
    length = input_ids.shape[1]
    rest, eos_ids, max_length = _native(stopping_criteria, generation_config.max_length)
    if lvspec_profile is not None:
        if lvspec_policy is not None:
            raise ValueError("lvspec_policy: expected none with lvspec_profile, which has one")
        profile = Profile.read(lvspec_profile)
        lvspec_policy = AcceptancePolicy.from_profile(profile, model, draft_model)
        lvspec_config = _by_profile(profile, lvspec_config)
    config = _config(lvspec_config, generation_config, eos_ids, max(1, max_length - length))
    if stop_strings is not None and lvspec_tokenizer is None:
        raise ValueError(
            "lvspec_tokenizer: expected one, with which stop_strings are found (HF's generate "
            "hands tokenizer= to no custom_generate), got None"
        )
    decoder = Decoder(
        model,
        draft_model,
        lvspec_policy,
        config,
        batch_size=1,
        logits_processor=logits_processor,
        stopping_criteria=rest,
        stop_strings=stop_strings,
        tokenizer=lvspec_tokenizer,
        warps=False,
    )
    target_inputs = _target_inputs(input_ids, prepared, decoder.target.family.position_rows)
    if decoder.draft is not None:
        if draft_inputs is None and bool(
            torch.isin(input_ids, input_ids.new_tensor(decoder.target.visual_ids)).any()
        ):
            raise ValueError(
                "draft_inputs: expected the prompt as the draft's processor returns it (the "
                "target's own inputs, if they are the same), because HF's generate does not hand "
                "on pixels, got None"
            )
        draft_inputs = {"input_ids": input_ids} if draft_inputs is None else draft_inputs
        draft_inputs = check_inputs(decoder.draft, draft_inputs)
    elif draft_inputs is not None:
        raise ValueError("draft_model: expected a model, for there are draft_inputs, got None")
    request = Request(
        target_inputs, draft_inputs, tokenizer=lvspec_tokenizer, streamer=lvspec_streamer
    )
    (result,) = decoder.run(iter([request]), ordered=True, return_exceptions=False)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=result.sequences)
    return result.sequences


def _check_not_dropped() -> None:
    """Refuse what HF's `generate` takes by name and hands to no callable.

    Nothing of it arrives here in any other way, so the caller's frame is asked for it.
    """
    frame = sys._getframe(3)  # behind `custom_generate` and its decorator
    if frame.f_code is not inspect.unwrap(GenerationMixin.generate).__code__:
        return
    for name, instead in _INSTEAD.items():
        if frame.f_locals.get(name) not in (None, False):
            raise ValueError(
                f"{name}: expected none with custom_generate, to which HF's generate does not hand "
                f"it on, got one; give {instead}"
            )


def _check_generation_config(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        raise ValueError(
            "generation_config: expected greedy decoding or sampling (num_beams=1, no "
            f"prompt_lookup_num_tokens, ...), got {mode.value}"
        )
    if (config.num_return_sequences or 1) > 1:
        raise ValueError(
            f"num_return_sequences: expected 1, got {config.num_return_sequences}; give the prompt "
            "several times to lvspec.generate"
        )
    if config.return_dict_in_generate:
        for name in _RETURNED_ONLY_BY_HF:
            if getattr(config, name, None):
                raise ValueError(
                    f"{name}: expected False, for only sequences are returned, got True"
                )
    if config.use_cache is False:
        raise ValueError("use_cache: expected True, for nothing is decoded without one, got False")
    if config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            "cache_implementation: expected None, for lvspec has its own cache, got "
            f"{config.cache_implementation!r}"
        )


def _check_prompt(input_ids: Tensor, prepared: Mapping[str, Any]) -> None:
    if prepared.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds: expected input_ids instead, got inputs_embeds")
    if input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise ValueError(
            f"input_ids: expected one prompt, (1, T) with T >= 1, got {tuple(input_ids.shape)}; "
            "lvspec.generate takes several prompts"
        )
    mask = prepared.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise ValueError("attention_mask: expected a prompt without padding, got one with padding")
    for name, cache in caches_in(prepared).items():
        if cache.get_seq_length() > 0:
            raise ValueError(
                f"{name}: expected none, for the whole prompt is read, got a cache of "
                f"{int(cache.get_seq_length())} positions"
            )


def _native(
    criteria: StoppingCriteriaList, max_length: int
) -> tuple[StoppingCriteriaList, tuple[int, ...], int]:
    """The criteria but for end of sequence and length, which the loop knows itself; ids; length."""
    rest, eos_ids = StoppingCriteriaList(), []
    lengths = []
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            ids = criterion.eos_token_id.flatten().tolist()
            eos_ids += [id_ for id_ in ids if id_ >= 0]  # -1 is HF's way to say none
        elif type(criterion) is MaxLengthCriteria:
            lengths.append(criterion.max_length)
        else:
            rest.append(criterion)
    return rest, tuple(eos_ids), min(lengths, default=max_length)


def _by_profile(profile: Profile, config: DecodeConfig | None) -> DecodeConfig:
    """The config with what the profile says of drafts, of which it may say nothing itself."""
    config, default = DecodeConfig() if config is None else config, DecodeConfig()
    for name in profile.config:
        if getattr(config, name) != getattr(default, name):
            raise ValueError(
                f"lvspec_config: expected {name} at its default with lvspec_profile, which says "
                f"{profile.config[name]}, got {getattr(config, name)}"
            )
    return replace(config, **profile.config)


def _config(
    config: DecodeConfig | None,
    generation_config: GenerationConfig,
    eos_ids: tuple[int, ...],
    max_new_tokens: int,
) -> DecodeConfig:
    config = DecodeConfig() if config is None else config
    if not isinstance(config, DecodeConfig):
        raise TypeError(f"lvspec_config: expected DecodeConfig, got {config!r}")
    for field in fields(DecodeConfig):
        value = getattr(config, field.name)
        if field.name in _DECIDED_BY_HF and value != field.default:
            raise ValueError(
                f"lvspec_config: expected {field.name} at its default, for generate's arguments "
                f"and the generation config say it, got {value}"
            )
    sampling = {}
    if generation_config.do_sample:
        # The draft samples likewise; the target's rows get these from logits_processor. Above 1
        # HF's top_p leaves all, and at 0 it leaves the best.
        top_k, top_p = generation_config.top_k or None, generation_config.top_p
        if top_p is not None and top_p <= 0:
            top_k, top_p = 1, None
        sampling = {
            "temperature": float(generation_config.temperature or 1.0),
            "top_k": top_k,
            "top_p": None if top_p is None else min(float(top_p), 1.0),
        }
    return replace(config, eos_ids=eos_ids, max_new_tokens=max_new_tokens, **sampling)


def _target_inputs(
    input_ids: Tensor, prepared: Mapping[str, Any], position_rows: int
) -> dict[str, Any]:
    """What the target's forward takes for the prompt, as HF has prepared it."""
    left_out = {*_OF_THE_LOOP, *caches_in(prepared)}
    found = {
        name: value
        for name, value in prepared.items()
        if name not in left_out and value is not None
    }
    if not found.get("mm_encoder_outputs", True):
        del found["mm_encoder_outputs"]
    positions = found.get("position_ids")
    if positions is not None:
        # HF puts a row of text positions before those of the rotary embedding.
        found["position_ids"] = (
            positions[-position_rows:]
            if positions.ndim == 3
            else positions.expand(position_rows, 1, -1)
        )
    return {"input_ids": input_ids, **found}
