"""The families of Video-LLMs, and the few operations that the loop needs of a model.

The only file with family names. HF models are used as they are: a prefill is the model's own
forward, a step is the text model's own forward with explicit positions and a `SlotCache`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lvspec.attention import AttentionStep
from lvspec.cache import SlotCache
from lvspec.capture import PassRecorder, is_recordable


@dataclass(frozen=True)
class Family:
    """How one `model_type` differs from the others.

    Attributes:
        name: For messages.
        visual_inputs: Names of the inputs that hold pixels.
        position_inputs: Names of the inputs that HF's position computation takes.
        has_static_pass: Whether a pass of the text model does the same whatever the numbers are, so
            that it can be recorded (no experts that are chosen in Python, for instance).
    """

    name: str
    visual_inputs: tuple[str, ...]
    position_inputs: tuple[str, ...]
    has_static_pass: bool

    def text_model(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.model.language_model

    def visual_ids(self, model: PreTrainedModel) -> tuple[int, ...]:
        """Ids of the placeholders that image and video features replace."""
        return (model.config.image_token_id, model.config.video_token_id)

    def prompt_positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Rotary positions of the prompt, int64 `[3, 1, T]`, those of HF's own `generate`."""
        ids = inputs["input_ids"]
        if inputs.get("image_grid_thw") is None and inputs.get("video_grid_thw") is None:
            return torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        chosen = {name: inputs[name] for name in self.position_inputs if name in inputs}
        positions, _ = model.model.get_rope_index(ids, **chosen)
        return positions


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        name="Qwen2.5-VL",
        visual_inputs=("pixel_values", "pixel_values_videos"),
        position_inputs=(
            "mm_token_type_ids",
            "image_grid_thw",
            "video_grid_thw",
            "second_per_grid_ts",
        ),
        has_static_pass=True,
    ),
}

_DYNAMIC_ROPE = ("dynamic", "longrope")


def check_family(model_type: str, role: str) -> Family:
    """The family of a `model_type`.

    Raises:
        ValueError: It is not supported; lists those that are.
    """
    if model_type not in FAMILIES:
        supported = ", ".join(f"{family.name} ({key})" for key, family in FAMILIES.items())
        raise ValueError(f"{role}: expected a model of {supported}, got model_type {model_type!r}")
    return FAMILIES[model_type]


@dataclass
class StepOutput:
    """What one pass over the slots returns.

    Attributes:
        logits: `[B, S, V]`, the model's dtype.
        masses, peaks: float32 `[L, B, Hq, S]`, one entry for every layer; None without scores.
    """

    logits: Tensor
    masses: Tensor | None
    peaks: Tensor | None


class Model:
    """An HF model of a supported family with the operations of the loop.

    Args:
        model: The HF model.
        role: "target" or "draft", for messages.
        capture: Whether to record passes and replay them, see `lvspec.capture`.

    Raises:
        TypeError: `model` is not an HF model.
        ValueError: The family is not supported, or uses sliding-window attention.
    """

    def __init__(self, model: PreTrainedModel, role: str, *, capture: bool = True) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"{role}: expected a transformers model, got {type(model).__name__}")
        self.hf, self.role = model, role
        self.family = check_family(model.config.model_type, role)
        self.text = self.family.text_model(model)
        layer_types = set(getattr(self.text.config, "layer_types", None) or ())
        if layer_types - {"full_attention"}:
            raise ValueError(
                f"{role}: expected full attention in every layer, got {sorted(layer_types)}"
            )
        self.visual_ids = self.family.visual_ids(model)
        # Rotary embeddings that follow the length of the sequence decide in Python what to compute.
        rope = getattr(self.text.config, "rope_parameters", None) or {}
        is_static = self.family.has_static_pass and rope.get("rope_type") not in _DYNAMIC_ROPE
        self.recorder = PassRecorder(self.text, model.lm_head) if capture and is_static else None

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def vocab_size(self) -> int:
        return self.text.config.vocab_size

    def new_cache(self, *, batch_size: int, capacity: int, num_slots: int) -> SlotCache:
        return SlotCache(
            self.text.config,
            batch_size=batch_size,
            capacity=capacity,
            num_slots=num_slots,
            dtype=self.text.dtype,
            device=self.device,
        )

    def records(self, cache: SlotCache) -> bool:
        """Whether passes over this cache are recorded and replayed."""
        return self.recorder is not None and is_recordable(cache.k.device, cache.workspace)

    def prefill(self, inputs: Mapping[str, Any], cache: SlotCache, sequence: int) -> Tensor:
        """HF's own forward over the prompt of one sequence, into its slot of the cache.

        Returns:
            logits of the last prompt token, `[1, V]`.
        """
        ids = inputs["input_ids"]
        positions = inputs.get("position_ids")  # there if HF's `generate` has prepared them
        if positions is None:
            positions = self.family.prompt_positions(self.hf, inputs)
        made_here = ("attention_mask", "position_ids")
        output = self.hf(
            **{name: value for name, value in inputs.items() if name not in made_here},
            position_ids=positions,
            past_key_values=cache.prefill_view(sequence),
            use_cache=True,
            logits_to_keep=1,
        )
        visual = torch.zeros_like(ids[0], dtype=torch.bool)
        for token in self.visual_ids:
            visual |= ids[0] == token
        cache.finish_prefill(sequence, positions[:, 0], visual)
        return output.logits[:, -1]

    def step(
        self,
        tokens: Tensor,
        depths: Tensor,
        ancestors: Tensor,
        cache: SlotCache,
        *,
        scores: bool = False,
    ) -> StepOutput:
        """One forward over all slots; their rows stand behind `cache.kv_len`, which is not moved.

        Args:
            tokens: int64 `[B, S]`.
            depths: integers `[S]` or `[B, S]`: position of a slot behind `kv_len`.
            ancestors: int64 `[B, S]`, see `lvspec.ops.verify_attention`.
            cache: This model's cache.
            scores: Whether attention leaves masses and peaks.
        """
        arguments = (tokens, depths, ancestors, *cache.tensors())
        recorded = None
        if self.records(cache):
            key = (*tokens.shape, depths.dim(), scores)
            recorded = self.recorder.get(
                key,
                lambda: _Pass(self.text, self.hf.lm_head, scores),
                partial(_example, *arguments),
            )
        if recorded is None:
            output = run_pass(self.text, self.hf.lm_head, tokens, depths, ancestors, cache, scores)
        else:
            output = recorded(*arguments)
        return StepOutput(*_with_scores(output))


def run_pass(
    text: nn.Module,
    head: nn.Module,
    tokens: Tensor,
    depths: Tensor,
    ancestors: Tensor,
    cache: SlotCache,
    scores: bool,
) -> tuple[Tensor, ...]:
    """Logits, and with `scores` masses and peaks of all layers."""
    batch_size, num_slots = tokens.shape
    index = (cache.kv_len[:, None] + depths).long()
    positions = cache.positions.gather(2, index.expand(3, batch_size, num_slots))
    cache.begin_step(num_slots)
    step = AttentionStep(cache.kv_len, ancestors, cache.visual, scores, cache.plan, cache.workspace)
    hidden = text(
        input_ids=tokens,
        position_ids=positions,
        attention_mask={"full_attention": None},
        past_key_values=cache,
        use_cache=True,
        lvspec_step=step,
    ).last_hidden_state
    logits = head(hidden)
    return (logits, torch.stack(step.masses), torch.stack(step.peaks)) if scores else (logits,)


class _Pass(nn.Module):
    """`run_pass` as a module whose arguments are tensors."""

    def __init__(self, text: nn.Module, head: nn.Module, scores: bool) -> None:
        super().__init__()
        self.text, self.head, self.scores = text, head, scores

    def forward(
        self,
        tokens: Tensor,
        depths: Tensor,
        ancestors: Tensor,
        k: Tensor,
        v: Tensor,
        kv_len: Tensor,
        visual: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, ...]:
        cache = SlotCache.over(k, v, kv_len, visual, positions)
        return run_pass(self.text, self.head, tokens, depths, ancestors, cache, self.scores)


def _with_scores(
    output: tuple[Tensor, ...] | Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits, masses, peaks; a recorded pass returns a single result as it is."""
    if isinstance(output, Tensor):
        output = (output,)
    return (*output, None, None)[:3]


def _example(tokens: Tensor, depths: Tensor, ancestors: Tensor, *cached: Tensor) -> tuple:
    """Arguments like these to record a pass with: an empty cache with room for its slots."""
    k, v, kv_len, visual, positions = cached
    slots = tokens.shape[1]
    room = max(slots, int(depths.max()) + 1)
    return (
        torch.zeros_like(tokens),
        depths.clone(),
        ancestors.clone(),
        torch.zeros_like(k[..., :room, :]),
        torch.zeros_like(v[..., :room, :]),
        torch.zeros_like(kv_len),
        torch.zeros_like(visual[:, :room]),
        torch.zeros_like(positions[..., :room]),
    )


def check_pair(target: Model, draft: Model) -> None:
    """Refuse a draft that cannot stand beside the target.

    Raises:
        ValueError: The devices or the ids of the visual placeholders differ.
    """
    if target.device != draft.device:
        raise ValueError(f"draft: expected a model on {target.device}, got {draft.device}")
    if target.visual_ids != draft.visual_ids:
        raise ValueError(
            f"draft: expected the target's image and video token ids {target.visual_ids}, got "
            f"{draft.visual_ids}"
        )


def check_inputs(model: Model, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of one sequence, ready for `Model.prefill`, without padding.

    Raises:
        TypeError: `inputs` is no mapping.
        ValueError: `input_ids` are missing or not of one sequence, the mask does not fit them, a
            tensor is on another device than the model, placeholders and pixels do not go
            together, or there are positions, embeddings or a cache, which are made here.
    """
    name = f"{model.role} inputs"
    if not hasattr(inputs, "keys"):
        raise TypeError(f"{name}: expected a mapping of tensors, got {type(inputs).__name__}")
    found = {key: inputs[key] for key in inputs.keys() if inputs[key] is not None}
    ids = found.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(
            f"{name}: expected input_ids of shape (1, T) with T >= 2, got {_shape_of(ids)}"
        )
    for key, value in found.items():
        if isinstance(value, Tensor) and value.device != model.device:
            raise ValueError(
                f"{name}: expected {key} on the {model.role}'s device {model.device}, got "
                f"{value.device}"
            )
    mask = found.pop("attention_mask", None)
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        raise ValueError(
            f"{name}: expected an attention_mask of shape {tuple(ids.shape)} like input_ids, got "
            f"{_shape_of(mask)}"
        )
    if mask is not None and not bool(mask.all()):
        kept = mask[0].bool()
        if int(kept.sum()) < 2:
            raise ValueError(
                f"{name}: expected an attention_mask that keeps at least 2 tokens, got one of "
                f"{int(kept.sum())}"
            )
        for key in ("input_ids", "mm_token_type_ids"):
            if key in found:
                found[key] = found[key][:, kept]
        ids = found["input_ids"]
    for key in ("position_ids", "past_key_values", "inputs_embeds"):
        if key in found:
            raise ValueError(f"{name}: expected no {key}, which lvspec makes itself, got one")
    has_pixels = any(key in found for key in model.family.visual_inputs)
    visual = torch.isin(ids, torch.tensor(model.visual_ids, device=ids.device))
    if has_pixels and not bool(visual.any()):
        raise ValueError(
            f"{name}: expected a video placeholder in the prompt (one of the token ids "
            f"{model.visual_ids}) because there are pixels, got none"
        )
    if not has_pixels and bool(visual.any()):
        raise ValueError(
            f"{name}: expected {' or '.join(model.family.visual_inputs)} because the prompt has "
            "video placeholders, got neither"
        )
    if has_pixels and "mm_token_type_ids" not in found:
        # Without them HF falls back to one-dimensional positions and says nothing.
        kinds = torch.zeros_like(ids)
        kinds[ids == model.hf.config.image_token_id] = 1
        kinds[ids == model.hf.config.video_token_id] = 2
        found["mm_token_type_ids"] = kinds
    return found


def _shape_of(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
