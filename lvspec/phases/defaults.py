"""What holds where nothing is said: what the target's generation config does to its logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessor

from lvspec.checks import token_ids
from lvspec.config import DecodeConfig
from lvspec.models.model import Model
from lvspec.policy import AcceptancePolicy

# Sampling is DecodeConfig's to say; what it has no name for is not applied.
_NOT_APPLIED = ("top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def usual_policy(draft: object) -> AcceptancePolicy:
    """Where none is said: `lvspec()`, but `strict()` for the draft "ngram"."""
    is_ngram = isinstance(draft, str) and draft == "ngram"
    return AcceptancePolicy.strict() if is_ngram else AcceptancePolicy.lvspec()


def eos_ids_of(target: Model, policy: AcceptancePolicy, config: DecodeConfig) -> tuple[int, ...]:
    """End-of-sequence ids of a run.

    Raises:
        TypeError, ValueError: Those of `config` are no token ids.
    """
    if config.eos_ids is None:
        return policy.eos_ids or target.eos_ids
    return token_ids("eos_ids", config.eos_ids)


class GenerationDefaults:
    """Logits processors by a model's generation config, made by HF's own builder.

    Of the generation config only what makes logits processors outside of sampling is looked at:
    penalties, bans, forced tokens, least lengths, watermarks, and so on. Sampling and the greatest
    length are `config`'s.

    Args:
        model: Whose generation config it is, as it is now.
        config: Its temperature, top-k and top-p are applied too, in the place where HF does.
        eos_ids: End-of-sequence ids of the run, in place of those of the generation config.
        given: The user's processors. One of the class of one of these takes its place, as in HF.

    Attributes:
        applied: The settings of the generation config that make a processor, by name; empty if none
            does, and then there is nothing to do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: DecodeConfig,
        *,
        eos_ids: Sequence[int],
        given: Sequence[LogitsProcessor] = (),
    ) -> None:
        self._model, self._given = model, LogitsProcessorList(given)
        self._max_new_tokens = config.max_new_tokens
        found, _ = model._prepare_generation_config(None)
        found.do_sample, found._eos_token_tensor = False, None
        if eos_ids:  # where HF's builder looks for them; `found` is a copy, as in HF's `generate`
            found._eos_token_tensor = torch.tensor(list(eos_ids), device=model.device)
        self.applied = self._find_applied(found)
        found.do_sample = config.samples
        found.temperature = config.temperature
        found.top_k, found.top_p = config.top_k, config.top_p
        for name in _NOT_APPLIED:
            setattr(found, name, None)
        self._config = found

    def processors(self, prompt: Tensor) -> LogitsProcessorList:
        """All processors of one sequence in HF's order, the given ones among them.

        Args:
            prompt: int64 `[1, T]`; some of them depend on its length.
        """
        return self._made(self._config, prompt)

    def example(self) -> LogitsProcessorList:
        """Those of a prompt of two tokens: of the same classes, in the same order, as of any."""
        return self.processors(self._short_prompt())

    def _short_prompt(self) -> Tensor:
        return torch.zeros(1, 2, dtype=torch.int64, device=self._model.device)

    def _made(self, config: GenerationConfig, prompt: Tensor) -> LogitsProcessorList:
        length = prompt.shape[1]
        config = copy.copy(config)
        config.max_length = length + self._max_new_tokens
        if config.min_new_tokens is not None:  # which is before `min_length`
            config.min_length = length + config.min_new_tokens
        # HF's builder looks at the ids themselves: on a device only where somebody needs them.
        has_penalty = config.encoder_repetition_penalty not in (None, 1.0)
        needs_prompt = has_penalty or bool(config.encoder_no_repeat_ngram_size)
        return self._model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=length,
            encoder_input_ids=prompt if needs_prompt else None,
            logits_processor=self._given,
            device=self._model.device,
        )

    def _find_applied(self, config: GenerationConfig) -> dict[str, Any]:
        """Those without which there would be fewer processors."""
        prompt = self._short_prompt()
        everything, applied = self._made(config, prompt), {}
        if all(processor in self._given for processor in everything):
            return applied
        for name, value in vars(config).items():
            if value is None or name.startswith("_"):
                continue
            without = copy.copy(config)
            setattr(without, name, None)
            if len(self._made(without, prompt)) < len(everything):
                applied[name] = value
        return applied
