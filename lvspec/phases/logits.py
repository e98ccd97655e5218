"""HF's logits processors on the rows of a verify pass.

HF applies a processor to one row at a time, that of the last token. A verify pass has a row for
every slot, and what stands before a slot is prompt, output and the slots on the way to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process
from transformers.generation.logits_process import (
    LogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lvspec.config import DecodeConfig
from lvspec.phases.defaults import GenerationDefaults

# By name, because not every supported version of transformers has all of them.
_ROW_ONLY = (
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
)

_REFUSED = {
    "AlternatingCodebooksLogitsProcessor": "is for audio codes",
    "BarkEosPrioritizerLogitsProcessor": "is for audio codes",
    "ClassifierFreeGuidanceLogitsProcessor": "needs a batch of conditional and unconditional rows",
    "DiaClassifierFreeGuidanceLogitsProcessor": "is for audio codes",
    "DiaEOSChannelFilterLogitsProcessor": "is for audio codes",
    "DiaEOSDelayPatternLogitsProcessor": "keeps state from one token to the next",
    "SynthIDTextWatermarkLogitsProcessor": "keeps state from one token to the next",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": (
        "runs the model itself and keeps its cache from one token to the next (guidance_scale, "
        "negative_prompt_ids)"
    ),
    "WhisperNoSpeechDetection": "keeps state from one token to the next",
    "WhisperTimeStampLogitsProcessor": "is for speech",
}


def _classes(names: Iterable[str]) -> dict[type, str]:
    found = {getattr(logits_process, name, None): name for name in names}
    found.pop(None, None)
    return found


_ROW_ONLY_CLASSES = _classes(_ROW_ONLY)
_REFUSED_CLASSES = _classes(_REFUSED)


class LogitsProcessors:
    """Logits processors in the order in which they are applied.

    Those of HF that look at a row alone (temperature, top-k, ...) are applied to all rows at once.
    Any other is called as HF calls it, for each row by itself: with the ids `[1, n]` of prompt,
    output and the drafted tokens on the way to the row's slot. It must be a function of these two
    arguments: it is called for tokens that are never output, and not in the order of the output.

    Args:
        processors: HF's, or functions `(input_ids, scores) -> scores`.
        warpers: More of them, applied behind those.
        batch_size: Sequences that are decoded together.
        defaults: Makes the processors of each sequence, in place of `processors` and `warpers`,
            which it knows; None: they are the same for all.

    Attributes:
        need_paths: Whether any looks at what stands before a row.

    Raises:
        TypeError: They are no list, one is not callable, or takes other arguments.
        ValueError: One cannot be applied to a row by itself.
    """

    def __init__(
        self,
        processors: Iterable[LogitsProcessor] = (),
        warpers: Iterable[LogitsProcessor] = (),
        *,
        batch_size: int = 1,
        defaults: GenerationDefaults | None = None,
    ) -> None:
        self._defaults = defaults
        given = check_list(processors)
        steps = [*given, *warpers]
        for processor in steps:
            _check("logits_processor", processor, batch_size)
        if defaults is not None:
            steps = defaults.example()
            for processor in steps:
                if processor not in given:
                    _check("generation_config", processor, batch_size)
        self._is_row_only = [type(processor) in _ROW_ONLY_CLASSES for processor in steps]
        self._of_place = [steps] * batch_size
        self.need_paths = not all(self._is_row_only)

    def __bool__(self) -> bool:
        return bool(self._is_row_only)

    @property
    def applied(self) -> Mapping[str, Any]:
        """What of the target's generation config is among them, by name."""
        return {} if self._defaults is None else self._defaults.applied

    def begin(self, place: int, prompt: Tensor) -> None:
        """A sequence with this prompt, int64 `[1, T]`, takes the place."""
        if self._defaults is not None:
            self._of_place[place] = self._defaults.processors(prompt)

    def rows(
        self,
        scores: Tensor,
        prefixes: Sequence[Tensor | None] = (),
        places: Sequence[int] | None = None,
    ) -> Tensor:
        """Apply all of them to `scores`.

        Args:
            scores: `[n, V]`.
            prefixes: Of every row the ids before it, int64 `[T]`, or None for a row that nobody
                reads; needed if `need_paths`.
            places: Of every row the place of its sequence; None: all are of place 0.

        Returns:
            `[n, V]`, float64 if `scores` are, else float32, as HF has it.
        """
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        scores = scores.to(dtype, copy=True)
        ids = torch.zeros(scores.shape[0], 1, dtype=torch.int64, device=scores.device)
        for step, is_row_only in enumerate(self._is_row_only):
            if is_row_only:
                scores = self._of_place[0][step](ids, scores)
                continue
            for row, prefix in enumerate(prefixes):
                if prefix is not None:
                    processor = self._of_place[0 if places is None else places[row]][step]
                    scores[row] = processor(prefix[None], scores[row : row + 1].clone())[0]
        return scores.to(dtype)

    def slots(
        self,
        logits: Tensor,
        tokens: Tensor,
        ancestors: Tensor,
        num_slots: Tensor,
        committed: Sequence[Tensor | None],
    ) -> Tensor:
        """Apply all of them to every slot's row.

        Args:
            logits: `[B, S, V]`.
            tokens: int64 `[B, S]`, slot 0 the last committed token.
            ancestors: int64 `[B, S]`, bit j for slot j.
            num_slots: int32 `[B]`.
            committed: Of every sequence prompt and output, int64 `[T]`; None where there is none.

        Returns:
            `[B, S, V]`, float64 if `logits` are, else float32.
        """
        prefixes: list[Tensor | None] = []
        batch_size, slots = tokens.shape
        places = [place for place in range(batch_size) for _ in range(slots)]
        if self.need_paths:
            seen_by, counts = ancestors.tolist(), num_slots.tolist()
            for b, before in enumerate(committed):
                for t, seen in enumerate(seen_by[b]):
                    if before is None or t >= counts[b]:
                        prefixes.append(None)
                        continue
                    # A slot stands behind its ancestors, so they are in the order of the path.
                    path = [j for j in range(1, t + 1) if seen >> j & 1]
                    prefixes.append(torch.cat([before, tokens[b, path]]))
        return self.rows(logits.flatten(0, 1), prefixes, places).view(logits.shape)


def sampling_warpers(config: DecodeConfig) -> list[LogitsProcessor]:
    """What temperature, top-k and top-p of `config` do to a row, in HF's order."""
    warpers: list[LogitsProcessor] = []
    if config.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k is not None:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1:
        warpers.append(TopPLogitsWarper(config.top_p))
    return warpers


def check_list(processors: Iterable[LogitsProcessor] | None) -> tuple[LogitsProcessor, ...]:
    """What a user gives as `logits_processor`, None being none.

    Raises:
        TypeError: It is no list.
    """
    if isinstance(processors, LogitsProcessor) or not isinstance(processors, Iterable | None):
        raise TypeError(f"logits_processor: expected a list, got {type(processors).__name__} alone")
    return tuple(processors or ())


def _check(source: str, processor: LogitsProcessor, batch_size: int) -> None:
    name = type(processor).__name__
    if not callable(processor):
        raise TypeError(f"{source}: expected callable entries, got {name}")
    ignored = ""
    if source == "generation_config":
        ignored = "; DecodeConfig(generation_config=False) leaves the generation config out"
    for refused, refused_name in _REFUSED_CLASSES.items():
        if isinstance(processor, refused):
            raise ValueError(
                f"{source}: expected functions of (input_ids, scores) that can be applied to the "
                f"row of any drafted token, got {name}, which {_REFUSED[refused_name]}{ignored}"
            )
    if isinstance(processor, PrefixConstrainedLogitsProcessor) and batch_size > 1:
        raise ValueError(
            f"{source}: expected no {name} with {batch_size} prompts at a time, because it "
            "is told which of a batch a row belongs to, got one"
        )
    required = [
        parameter.name
        for parameter in inspect.signature(processor).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(required) > 2:
        raise TypeError(
            f"{source}: expected functions of (input_ids, scores), got "
            f"{name}({', '.join(required)})"
        )
