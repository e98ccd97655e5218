"""Parts of HF's text models as single C++ operations, while they are recorded or read a prompt.

A pass of a few slots through a small model is some sixty operations a layer, most of them over
before their call is. Norms, gated MLPs, rotary angles, and what comes between projections and
attention have one operation each in `csrc/`, and so have products of a few rows, for which the
libraries are not made. Modules are recognised by their parts and by what they
compute: on random numbers the operation must give what the module's own code gives, or the module
is left as it is. Patches are on the modules in hand and gone when the recording is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvspec.attention import NAME, AttentionStep, lvspec_attention
from lvspec.cache import SlotCache
from lvspec.ops import active_backend
from lvspec.ops.cpp_backend import instruction_set
from lvspec.tree import chain_ancestors

MAX_ROWS = {"avx512": 128, "avx2": 40, "portable": 4}
"""Rows up to which csrc/linear.h was seen to be faster than torch, by instruction set."""

Patch = tuple[nn.Module, Callable]
"""A module, and what is its `forward` for the time being."""


@cache
def max_rows() -> int:
    """Of a product that csrc/linear.h computes; 0 where it is not there."""
    return MAX_ROWS[instruction_set()] if active_backend("cpu") == "cpp" else 0


def recognise(modules: Iterable[nn.Module]) -> list[Patch]:
    """The parts that have an operation of their own.

    Args:
        modules: All of them, not only the outermost. Other types than float32 are left alone.
    """
    found = []
    for module in list(modules):
        if "forward" in vars(module):  # someone else's patch
            continue
        for make in (_linear, _rms_norm, _gated_mlp, _rotary_angles, _attention):
            forward = make(module)
            if forward is not None:
                found.append((module, forward))
    return found


@contextmanager
def fused(patches: Iterable[Patch]) -> Iterator[None]:
    """Within this context the recognised parts call operations of `csrc/`."""
    with ExitStack() as stack:
        for module, forward in patches:
            stack.enter_context(_forward(module, forward))
        yield


@contextmanager
def _forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    if "forward" in vars(module):  # someone else's patch, put there since
        yield
        return
    module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        vars(module).pop("forward", None)


def _linear(module: nn.Module) -> Callable | None:
    is_linear = (
        type(module) is nn.Linear
        and _is_weight(module.weight, 2)
        and (module.bias is None or _is_weight(module.bias, 1))
    )

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        if not _is_rows(input, self.in_features) or _count(input) > max_rows():
            return nn.Linear.forward(self, input)
        return torch.ops.lvspec.cpu_linear(input, self.weight, self.bias)

    return forward if is_linear else None


def _rms_norm(module: nn.Module) -> Callable | None:
    weight = getattr(module, "weight", None)
    is_norm = (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and _is_weight(weight, 1)
    )

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        if not _is_rows(hidden_states, self.weight.shape[0]):
            return type(self).forward(self, hidden_states)
        return torch.ops.lvspec.cpu_rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward if is_norm and _agrees(module, forward, weight.shape[0], 1e-6) else None


def _gated_mlp(module: nn.Module) -> Callable | None:
    layers = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    is_gated = all(
        type(layer) is nn.Linear and layer.bias is None and _is_weight(layer.weight, 2)
        for layer in layers
    )

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        gate, up = self.gate_proj.weight, self.up_proj.weight
        if not _is_rows(x, gate.shape[1]):
            return type(self).forward(self, x)
        if _count(x) <= max_rows():
            hidden = torch.ops.lvspec.cpu_gated_linear(x, gate, up)
        else:
            products = functional.linear(x, gate), functional.linear(x, up)
            hidden = torch.ops.lvspec.cpu_silu_multiply(*products)
        return self.down_proj(hidden)

    return forward if is_gated and _agrees(module, forward, layers[0].in_features, 1e-5) else None


def _rotary_angles(module: nn.Module) -> Callable | None:
    sections = getattr(module, "mrope_section", None)
    frequencies = getattr(module, "inv_freq", None)
    is_rotary = (
        isinstance(sections, list)
        and isinstance(getattr(module, "attention_scaling", None), float)
        and _is_weight(frequencies, 1)
        and all(isinstance(size, int) and size >= 0 for size in sections)
        and sum(sections) == frequencies.shape[0]
    )
    if not is_rotary:
        return None
    table = torch.tensor(sections)

    def forward(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        is_plain = position_ids.dtype == torch.int64 and position_ids.shape[0] == 3
        if x.dtype != torch.float32 or position_ids.dim() != 3 or not is_plain:
            return type(self).forward(self, x, position_ids)
        return torch.ops.lvspec.cpu_rotary_angles(
            position_ids, self.inv_freq, table, self.attention_scaling
        )

    def same() -> bool:
        positions = torch.randint(0, 3000, (3, 2, 7), generator=_generator())
        x = torch.zeros(2, 7, 1)
        theirs = type(module).forward(module, x, positions)
        return _are_close(forward(module, x, positions), theirs, 1e-6)

    return forward if _holds(same) else None


def _attention(module: nn.Module) -> Callable | None:
    layers = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    is_attention = (
        all(type(layer) is nn.Linear and _is_weight(layer.weight, 2) for layer in layers)
        and isinstance(getattr(module, "layer_idx", None), int)
        and isinstance(getattr(module, "head_dim", None), int)
        and isinstance(getattr(module, "scaling", None), float)
    )

    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        *args: Any,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cache, angles = past_key_values, position_embeddings
        row = (*hidden_states.shape[:2], self.head_dim)
        is_step = (
            not args
            and kwargs.get("lvspec_step") is not None
            and isinstance(cache, SlotCache)
            and angles is not None
            and all(x.dtype == torch.float32 for x in (cache.k, cache.v, hidden_states, *angles))
            and all(tuple(x.shape) == row for x in angles)
        )
        if not is_step:
            kwargs |= {"past_key_values": cache, "position_embeddings": angles}
            return type(self).forward(self, hidden_states, *args, **kwargs)
        projected = [layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        query = torch.ops.lvspec.cpu_rotate_and_write(
            *projected, *angles, cache.k, cache.v, self.layer_idx, cache.kv_len
        )
        key, value = cache.k[self.layer_idx], cache.v[self.layer_idx]
        kwargs |= {"attention_mask": None, "scaling": self.scaling}
        out, _ = lvspec_attention(self, query, key, value, **kwargs)
        return self.o_proj(out.reshape(*row[:2], -1)), None

    def run(code: Callable) -> tuple[Tensor, ...]:
        """What `code` returns, writes and scores for two sequences in a small cache."""
        kv_heads = layers[1].out_features // module.head_dim
        generator = _generator()
        hidden = torch.randn(2, 3, layers[0].in_features, generator=generator)
        angles = tuple(torch.randn(2, 2, 3, module.head_dim, generator=generator))
        shape = (module.layer_idx + 1, 2, kv_heads, 8, module.head_dim)
        k, v = (torch.randn(shape, generator=generator) for _ in range(2))
        visual = (torch.arange(8) % 2).to(torch.uint8).repeat(2, 1)
        kv_len = torch.tensor([2, 4], dtype=torch.int32)
        cache = SlotCache.over(k, v, kv_len, visual, torch.zeros(3, 2, 8, dtype=torch.long))
        cache.begin_step(3)
        step = AttentionStep(kv_len, chain_ancestors(3, batch_size=2, device="cpu"), visual, True)
        out, _ = code(
            module,
            hidden,
            attention_mask=None,
            past_key_values=cache,
            position_embeddings=angles,
            lvspec_step=step,
        )
        return out, k, v, *step.masses, *step.peaks

    def same() -> bool:
        before = module.config._attn_implementation
        module.config._attn_implementation = NAME
        try:
            return _are_close(run(forward), run(type(module).forward), 1e-5)
        finally:
            module.config._attn_implementation = before

    return forward if is_attention and _holds(same) else None


def _is_weight(x: Any, dim: int) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter, nn.Buffer)
        and x.dim() == dim
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
    )


def _is_rows(x: Tensor, size: int) -> bool:
    return x.dtype == torch.float32 and x.dim() == 3 and x.shape[-1] == size


def _count(x: Tensor) -> int:
    """Rows of `[B, S, size]`."""
    return x.shape[0] * x.shape[1]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _agrees(module: nn.Module, forward: Callable, size: int, tolerance: float) -> bool:
    """Whether `forward` gives what the module's own code does, for small and for large numbers."""

    def same() -> bool:
        rows = torch.randn(1, 3, size, generator=_generator()) * torch.logspace(-3, 3, 3)[:, None]
        return all(
            _are_close((forward(module, x),), (type(module).forward(module, x),), tolerance)
            for x in (rows, rows[:, 1:2])
        )

    return _holds(same)


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except Exception:  # whatever this is, it is not the code that was expected
        return False


def _are_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> bool:
    """Up to `tolerance` times the largest number of a row."""
    return len(ours) == len(theirs) and all(
        x.shape == y.shape
        and x.dtype == y.dtype
        and bool(((x - y).abs().amax(-1) <= tolerance * y.abs().amax(-1)).all())
        for x, y in zip(ours, theirs, strict=True)
    )
