"""The few operations that the loop needs of a model.

HF models are used as they are: a prefill is the model's own forward around lvspec's text pass, a
step is that pass over a few slots with explicit positions and a `SlotCache`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lvspec.config import CacheDtype, Fuse
from lvspec.models.attention import AttentionStep, lvspec_attention_on
from lvspec.models.cache import Beginning, SlotCache
from lvspec.models.cpu_pass import max_rows
from lvspec.models.families import check_family
from lvspec.models.head import DraftHead
from lvspec.models.hf_names import CACHE, CACHE_NAMES
from lvspec.models.own_passes import Made, OwnPasses
from lvspec.models.patch_embedding import patches_multiplied
from lvspec.models.plan import as_hf_takes_them
from lvspec.models.ranks import parts_of_heads, ranks_of
from lvspec.models.stored import bytes_of_pass
from lvspec.models.text_pass import (
    StepOutput,
    hf_pass,
    own_pass,
    prompts_read_by,
    slot_positions,
)
from lvspec.models.watch import watch_of
from lvspec.ops.scaled_linear import converts_from_float8
from lvspec.reference.float8 import FLOAT8

MADE_HERE = ("position_ids", *CACHE_NAMES, "inputs_embeds", "use_cache", "logits_to_keep")
"""Inputs of HF's forward that nobody else may give."""

RunChain = Callable[..., Tensor]
"""`CpuPass.chain`."""

_STATE_OF_PROMPTS = ("rope_deltas",)


class Model:
    """An HF model of a supported family with the operations of the loop.

    Args:
        model: The HF model.
        role: "target" or "draft", for messages.
        fuse: Whose code runs its passes, see `DecodeConfig.fuse`.
        cache_dtype: Of its caches, see `DecodeConfig.cache_dtype`.

    Raises:
        TypeError: `model` is not an HF model.
        ValueError: The family or its text model is not supported, it uses sliding-window attention
            in some layers, or it is a part of a model that somebody else has spread over processes.

    Attributes:
        ranks: The processes that share the model.
        is_static: Whether a pass computes the same whatever the length of the sequence.
        length_limit: Positions up to which its rotary embedding computes the same for all rows,
            where that follows the length of the sequence; else None.
        seeing: A context for reading a prompt, see `lvspec.models.tower`.
    """

    seeing: Callable[[], AbstractContextManager] = nullcontext

    def __init__(
        self,
        model: PreTrainedModel,
        role: str,
        *,
        fuse: Fuse = "kernels",
        cache_dtype: CacheDtype = "auto",
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"{role}: expected a transformers model, got {type(model).__name__}")
        self.hf, self.role, self.cache_dtype = model, role, cache_dtype
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
        self.length_limit = _length_limit(self.text.config)
        self.is_static = self.family.has_static_pass and self.length_limit is None
        self.ranks = ranks_of(self.text)
        if self.ranks.size == 1 and (model.tp_size or 1) > 1:
            raise ValueError(
                f"{role}: expected a whole model, or a target that load_pair(tensor_parallel=True) "
                f"has spread over processes, got one that transformers has ({model.tp_size} parts)"
            )
        self.watch = watch_of(self.text)
        obstacle = None if self.family.has_static_pass else "experts are chosen by value"
        self._own = OwnPasses(self.text, model, fuse, self.watch, role, obstacle)

    @property
    def device(self) -> torch.device:
        """Where it computes; weights that accelerate has put elsewhere are on "meta" meanwhile."""
        hook = getattr(self.text.get_input_embeddings(), "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        is_away = self.hf.device.type == "meta" and device is not None
        return torch.device(device) if is_away else self.hf.device

    @property
    def vocab_size(self) -> int:
        return self.text.config.vocab_size

    @property
    def input_names(self) -> frozenset[str]:
        """Names of the inputs that the model takes, those that lvspec makes itself excepted."""
        names = self._forward_inputs | set(self.family.position_inputs)
        return names - {"self", "kwargs", *MADE_HERE}

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids of the model's generation config, or of its text config."""
        generation_config = getattr(self.hf, "generation_config", None)
        for config in (generation_config, self.hf.config.get_text_config()):
            found = getattr(config, "eos_token_id", None)
            if found is not None:
                ids = found if isinstance(found, (list, tuple)) else (found,)
                return tuple(id_ for id_ in ids if id_ >= 0)  # -1 is a way to say none
        return ()

    @property
    def step_bytes(self) -> int:
        """Bytes of the weights that a pass of the text model reads."""
        return self.step_bytes_with(self.hf.lm_head)

    def step_bytes_with(self, head: nn.Module) -> int:
        """The same with another head."""
        return bytes_of_pass(self.text, head)

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
        is_float8 = self.cache_dtype == "fp8"
        if is_float8 and not converts_from_float8(self.device):
            raise ValueError(
                "cache_dtype: expected a GPU of compute capability 8.9 or more for 'fp8', got "
                f"{torch.cuda.get_device_name(self.device)}"
            )
        return SlotCache(
            self.text.config,
            position_rows=self.family.position_rows,
            batch_size=batch_size,
            capacity=capacity,
            num_slots=num_slots,
            dtype=FLOAT8 if is_float8 else self.text.dtype,
            device=self.device,
            heads=parts_of_heads(self.text),
        )

    def check_length(self, count: int) -> None:
        """Refuse sequences in which rows of one pass would need different rotary frequencies.

        Args:
            count: Rotary positions of prompt, new tokens and the slots behind them.

        Raises:
            ValueError: There are more than `length_limit`. From there on frequencies follow the
                length of the sequence as each token is decoded, and a pass over several slots or
                sequences has one set for all.
        """
        if self.length_limit is not None and count > self.length_limit:
            raise ValueError(
                f"{self.role}: expected at most {self.length_limit} positions (prompt, new tokens "
                "and slots), up to which the frequencies of its rotary embedding "
                f"({self.text.config.rope_parameters['rope_type']}) stay as they are, got {count}"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context in which no other thread uses the model, found as it is when this is entered.

        What stands in for its parts and its passes is up to date within it.

        Raises:
            RuntimeError: Another text model stands where this one was.
        """
        if self.family.text_model(self.hf) is not self.text:
            raise RuntimeError(
                f"{self.role}: expected the text model that was there in the beginning, got "
                "another one; make a new Decoder"
            )
        is_first = not self.watch.is_held
        with self.watch.held(self.text, self.hf.lm_head, self.role):
            if is_first:
                self._own.look()
            yield

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context for steps, entered once for many: nobody else uses the model."""
        with self.held(), lvspec_attention_on(self.text):
            yield

    def forget(self) -> None:
        """Give up what was made for the model, and undo what was done to its weights."""
        self._own.forget()

    @property
    def made(self) -> Made:
        """The plan that passes follow, or why they are HF's."""
        with self.held():
            return self._made_now()

    def _made_now(self) -> Made:
        """The same while the model is held."""
        made = self._own.made
        if made.cpu is None or self.cache_dtype == "auto":
            return made
        self.watch.say(
            f"passes of the {self.role} are many operations, slower: there is none in C++ over a "
            f'cache of another type (cache_dtype="{self.cache_dtype}")'
        )
        return replace(made, cpu=None)

    def prefill(
        self,
        inputs: Mapping[str, Any],
        cache: SlotCache,
        sequence: int,
        *,
        following: int = 0,
        beginning: Beginning | None = None,
    ) -> Tensor:
        """HF's own forward over the prompt of one sequence, into its place in the cache.

        Args:
            inputs: The prompt.
            cache: This model's cache.
            sequence: Its place.
            following: Positions that may be taken behind the prompt.
            beginning: What another place has read of this prompt already, pixels and all: it is
                copied, and the forward is over the tokens behind it.

        Returns:
            logits of the last prompt token, `[1, V]`.

        Raises:
            ValueError: See `check_length`.
        """
        ids = inputs["input_ids"]
        not_passed = {"position_ids", "attention_mask"}
        not_passed |= set(self.family.position_inputs) - self._forward_inputs
        positions = inputs.get("position_ids")  # there if HF's `generate` has prepared them
        if positions is None:
            positions = self.family.prompt_positions(self.hf, inputs)
        if self.length_limit is not None:
            last = max(int(positions.max()), int(positions[..., -1].max()) + following)
            self.check_length(last + 1)
        begun, given = 0, {n: value for n, value in inputs.items() if n not in not_passed}
        if beginning is not None and cache.k_scale is not None:
            self.watch.say(
                f"prompts about one clip are read one after the other by the {self.role}, slower: "
                'with cache_dtype="fp8" what they share is not kept as it was'
            )
        elif beginning is not None:
            begun, given = beginning.length, {"input_ids": ids[:, beginning.length :]}
            cache.begin_as(sequence, beginning)
        num_rows = ids.shape[1] - begun
        with self._reading(cache, sequence, begun, num_rows), self.seeing():
            output = self.hf(
                **given,
                position_ids=as_hf_takes_them(positions[..., begun:]),
                **{CACHE: cache.prefill_view(sequence, begun)},
                use_cache=True,
                logits_to_keep=1,
            )
        visual = torch.zeros_like(ids[0], dtype=torch.bool)
        for token in self.visual_ids:
            visual |= ids[0] == token
        cache.finish_prefill(sequence, positions[:, 0], visual)
        return self.ranks.first(output.logits[:, -1])[0]

    @contextmanager
    def _reading(
        self, cache: SlotCache, sequence: int, begun: int, num_rows: int
    ) -> Iterator[None]:
        """A context for HF's forward over a prompt, which leaves nothing behind on the model."""
        state = vars(self.hf.model)
        # What HF's own loop would go on with, be it from a call of the user's before this one.
        kept = {name: state[name] for name in _STATE_OF_PROMPTS if name in state}
        with self.held():
            for module in (self.hf, self.hf.model):
                if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                    self.watch.say(
                        f"{type(module).__name__} of the {self.role} has hooks or another forward "
                        "than its class: they see prompts, but not the passes behind them, which "
                        "are of the text model and the head"
                    )
            made = self._made_now()
            try:
                if made.plan is None:
                    yield
                else:
                    is_short = made.cpu is not None and num_rows <= max_rows()
                    read = made.cpu.read if is_short else None
                    reading = prompts_read_by(made.plan, cache, sequence, begun, read)
                    with patches_multiplied(self.hf), reading:
                        yield
            finally:
                state.update(kept)

    def chain(self, rows: int, head: DraftHead) -> RunChain | None:
        """All passes of a greedy chain as one operation, where there is one for this model.

        Args:
            rows: Of the first pass.
            head: Makes the logits.
        """
        cpu = (self._made_now() if self.watch.is_held else self.made).cpu
        return cpu.chain if cpu is not None and cpu.takes(rows, head) else None

    def step(
        self,
        tokens: Tensor,
        depths: Tensor,
        ancestors: Tensor,
        cache: SlotCache,
        *,
        scores: bool = False,
        head: DraftHead | None = None,
    ) -> StepOutput:
        """One forward over all slots; their rows stand behind `cache.kv_len`, which is not moved.

        Args:
            tokens: int64 `[B, S]`.
            depths: integers `[S]` or `[B, S]`: position of a slot behind `kv_len`.
            ancestors: int64 `[B, S]`, see `lvspec.ops.verify_attention`.
            cache: This model's cache.
            scores: Whether attention leaves masses and peaks.
            head: Makes the logits; None: the model's own.
        """
        made = self._made_now() if self.watch.is_held else self.made
        head = self.hf.lm_head if head is None else head
        if made.cpu is not None and made.cpu.takes(tokens.numel(), head):
            return StepOutput(*made.cpu.run(tokens, depths, ancestors, cache, scores, head))
        positions = slot_positions(cache, depths, tokens.shape)
        step = AttentionStep(
            cache.kv_len,
            ancestors,
            cache.visual,
            scores,
            cache.plan,
            cache.workspace,
            cache.scales(),
        )
        if made.plan is not None:
            hidden = own_pass(made.plan, tokens, positions, cache, step)
        else:
            cache.begin_step(tokens.shape[1])
            with lvspec_attention_on(self.text):
                hidden = hf_pass(self.text, tokens, positions, cache, step)
        logits = head(hidden).to(tokens.device)
        if not scores:
            return StepOutput(logits, None, None)
        scores = torch.stack(step.masses), torch.stack(step.peaks)
        return StepOutput(logits, *self.ranks.mean_of_heads(*scores))


def _length_limit(text_config: PretrainedConfig) -> int | None:
    """See `Model.length_limit`."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return text_config.max_position_embeddings if rope.get("rope_type") == "dynamic" else None
