"""The families of Video-LLMs, and the few operations that the loop needs of a model.

The only file with family names. HF models are used as they are: a prefill is the model's own
forward, a step is the text model's own forward with explicit positions and a `SlotCache`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from lvspec.attention import AttentionStep
from lvspec.cache import SlotCache
from lvspec.capture import PassRecorder, is_recordable


@dataclass(frozen=True)
class Family:
    """How one `model_type` differs from the others.

    Attributes:
        name: For messages.
        text_types: `model_type` of the text models that it may have. Their attention must be what
            `verify_attention` computes: no sinks, no soft cap.
        visual_inputs: Names of the inputs that hold pixels.
        placeholders: Fields of the config with the ids that image and video features replace.
        position_inputs: Names of the inputs that HF's `get_rope_index` takes, for families with
            rotary positions in time, height and width. Empty: positions count the tokens.
        text_attribute: Where the text model is in `model.model`.
        has_static_pass: Whether a pass of the text model does the same whatever the numbers are, so
            that it can be recorded (no experts that are chosen in Python, for instance).
        patches_frames: Whether `lvspec.preprocess` makes its pixels, so that HF's processor is not
            needed.
    """

    name: str
    text_types: tuple[str, ...]
    visual_inputs: tuple[str, ...] = ("pixel_values", "pixel_values_videos")
    placeholders: tuple[str, ...] = ("image_token_id", "video_token_id")
    position_inputs: tuple[str, ...] = ()
    text_attribute: str = "language_model"
    has_static_pass: bool = True
    patches_frames: bool = False

    @property
    def position_rows(self) -> int:
        """Rotary positions of a token: time, height and width, or one."""
        return 3 if self.position_inputs else 1

    def text_model(self, model: PreTrainedModel) -> PreTrainedModel:
        return getattr(model.model, self.text_attribute)

    def visual_ids(self, model: PreTrainedModel) -> tuple[int, ...]:
        """Ids of the placeholders that image and video features replace."""
        return tuple(getattr(model.config, field) for field in self.placeholders)

    def prompt_positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Rotary positions of the prompt, int64 `[R, 1, T]`, those of HF's own `generate`."""
        ids = inputs["input_ids"]
        if not any(name in inputs for name in self.position_inputs if name.endswith("_grid_thw")):
            return torch.arange(ids.shape[1], device=ids.device).expand(self.position_rows, 1, -1)
        chosen = {name: inputs[name] for name in self.position_inputs if name in inputs}
        positions, _ = model.model.get_rope_index(ids, **chosen)
        return positions


_GRIDS = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw")

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        name="Qwen2-VL",
        text_types=("qwen2_vl_text",),
        position_inputs=_GRIDS,
        patches_frames=True,
    ),
    "qwen2_5_vl": Family(
        name="Qwen2.5-VL",
        text_types=("qwen2_5_vl_text",),
        position_inputs=(*_GRIDS, "second_per_grid_ts"),
        patches_frames=True,
    ),
    "qwen3_vl": Family(
        name="Qwen3-VL",
        text_types=("qwen3_vl_text",),
        position_inputs=_GRIDS,
    ),
    "qwen3_vl_moe": Family(
        name="Qwen3-VL-MoE",
        text_types=("qwen3_vl_moe_text",),
        position_inputs=_GRIDS,
        has_static_pass=False,
    ),
    "llava_onevision": Family(name="LLaVA-OneVision", text_types=("qwen2",)),
    "llava_next_video": Family(name="LLaVA-NeXT-Video", text_types=("llama", "mistral", "qwen2")),
    "internvl": Family(
        name="InternVL",
        text_types=("qwen2", "qwen3", "llama"),
        visual_inputs=("pixel_values",),
        placeholders=("image_token_id",),
    ),
    "smolvlm": Family(
        name="SmolVLM2",
        text_types=("llama",),
        visual_inputs=("pixel_values",),
        placeholders=("image_token_id",),
        text_attribute="text_model",
    ),
}

# Inputs that say where tokens are in a video. Families that do not ask may be given them: a
# processor, or a draft of another family, may.
_POSITION_HINTS = ("mm_token_type_ids", "second_per_grid_ts")

# HF's text models take a mask of four dimensions for a finished one and build none. What a slot
# sees is in the `AttentionStep`; this is never read.
_NO_MASK = torch.zeros(1, 1, 1, 1, dtype=torch.bool)

_MADE_HERE = ("position_ids", "past_key_values", "inputs_embeds", "use_cache", "logits_to_keep")

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
        ValueError: The family or its text model is not supported, or it uses sliding-window
            attention in some layers.
    """

    def __init__(self, model: PreTrainedModel, role: str, *, capture: bool = True) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"{role}: expected a transformers model, got {type(model).__name__}")
        self.hf, self.role = model, role
        self.family = check_family(model.config.model_type, role)
        self.text = self.family.text_model(model)
        text_type = self.text.config.model_type
        if text_type not in self.family.text_types:
            raise ValueError(
                f"{role}: expected a text model of {' or '.join(self.family.text_types)} in "
                f"{self.family.name}, got {text_type!r}"
            )
        layer_types = set(getattr(self.text.config, "layer_types", None) or ())
        if layer_types - {"full_attention"}:
            raise ValueError(
                f"{role}: expected full attention in every layer, got {sorted(layer_types)}"
            )
        # Mistral slides a window in every layer and lists no layer types.
        self.window = None
        if not layer_types:
            self.window = getattr(self.text.config, "sliding_window", None)
        self.visual_ids = self.family.visual_ids(model)
        self._forward_inputs = frozenset(inspect.signature(model.forward).parameters)
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

    @property
    def input_names(self) -> frozenset[str]:
        """Names of the inputs that the model takes, those that lvspec makes itself excepted."""
        names = self._forward_inputs | set(self.family.position_inputs)
        return names - {"self", "kwargs", *_MADE_HERE}

    @property
    def step_bytes(self) -> int:
        """Bytes of the weights that a pass of the text model reads."""
        weights = {*self.text.parameters()} - {self.text.get_input_embeddings().weight}
        weights |= {*self.hf.lm_head.parameters()}  # may be the embeddings
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def new_cache(self, *, batch_size: int, capacity: int, num_slots: int) -> SlotCache:
        """An empty cache for this model.

        Raises:
            ValueError: It is longer than the model's sliding window, within which alone its
                attention is full attention.
        """
        if self.window is not None and capacity > self.window:
            raise ValueError(
                f"{self.role}: expected at most {self.window} positions (prompt, new tokens and "
                f"slots), the sliding window of its text model, got {capacity}"
            )
        return SlotCache(
            self.text.config,
            position_rows=self.family.position_rows,
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
        not_passed = {"position_ids", "attention_mask"}
        not_passed |= set(self.family.position_inputs) - self._forward_inputs
        positions = inputs.get("position_ids")  # there if HF's `generate` has prepared them
        if positions is None:
            positions = self.family.prompt_positions(self.hf, inputs)
        output = self.hf(
            **{name: value for name, value in inputs.items() if name not in not_passed},
            position_ids=_as_hf_takes_them(positions),
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
    rows = cache.positions.shape[0]
    positions = cache.positions.gather(2, index.expand(rows, batch_size, num_slots))
    cache.begin_step(num_slots)
    step = AttentionStep(cache.kv_len, ancestors, cache.visual, scores, cache.plan, cache.workspace)
    logits = head(text_pass(text, tokens, positions, cache, step))
    return (logits, torch.stack(step.masses), torch.stack(step.peaks)) if scores else (logits,)


def text_pass(
    text: nn.Module, tokens: Tensor, positions: Tensor, cache: Cache, step: AttentionStep
) -> Tensor:
    """The text model's own forward over slots, its attention being `step`'s: `[B, S, hidden]`.

    Args:
        text: Set to lvspec's attention.
        tokens: int64 `[B, S]`.
        positions: int64 `[R, B, S]`.
        cache: Takes the slots' keys and values, and returns those of the whole sequence.
        step: What attention needs, and where it leaves its scores.
    """
    return text(
        input_ids=tokens,
        position_ids=_as_hf_takes_them(positions),
        attention_mask=_NO_MASK,
        past_key_values=cache,
        use_cache=True,
        lvspec_step=step,
    ).last_hidden_state


def _as_hf_takes_them(positions: Tensor) -> Tensor:
    """`[3, B, T]`, or `[B, T]` where a token has one position."""
    return positions if positions.shape[0] > 1 else positions[0]


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
            together, the model does not take an input, or there are positions, embeddings or a
            cache, which are made here.
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
    for key in _MADE_HERE:
        if key in found:
            raise ValueError(f"{name}: expected no {key}, which lvspec makes itself, got one")
    mask = found.pop("attention_mask", None)
    for key in found.keys() - model.input_names:
        if key not in _POSITION_HINTS:
            raise ValueError(f"{name}: expected inputs that {model.family.name} takes, got {key!r}")
        del found[key]
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
    takes_kinds = "mm_token_type_ids" in model.family.position_inputs
    if has_pixels and takes_kinds and "mm_token_type_ids" not in found:
        # Without them HF falls back to one-dimensional positions and says nothing.
        kinds = torch.zeros_like(ids)
        for kind, token in enumerate(model.visual_ids, start=1):
            kinds[ids == token] = kind
        found["mm_token_type_ids"] = kinds
    return found


def _shape_of(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
