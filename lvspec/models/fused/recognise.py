"""Which modules of a text model are parts that have an operation of their own.

Modules are recognised by their parts and by what they compute: on random numbers the operation must
give what the module's own code gives, or the module is left as it is.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lvspec.models.attention import NAME, AttentionStep, lvspec_attention
from lvspec.models.cache import SlotCache
from lvspec.models.fused.operations import Angles, Operations
from lvspec.models.fused.patches import Patch, fused, has_forward, is_patched
from lvspec.models.hf_names import CACHE
from lvspec.tree import chain_ancestors

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_OF_A_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class Patches(list[Patch]):
    """Patches, and how many parts of every kind they are for."""

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """By kind: "layer", "attention", "mlp", "norm", "rotary", "linear"; 0 where none is."""
        kinds = {
            "layer": _is_decoder_layer,
            "attention": _is_attention,
            "mlp": is_gated_mlp,
            "norm": is_rms_norm,
            "rotary": is_rotary,
            "linear": lambda module: isinstance(module, nn.Linear),
        }
        return {kind: sum(is_one(module) for module, _ in self) for kind, is_one in kinds.items()}


def recognise(modules: Iterable[nn.Module], operations: Operations) -> Patches:
    """The parts that have an operation of their own.

    Args:
        modules: All of them, not only the outermost. Those with a patch are left alone.
        operations: What stands in for them. Weights that they do not take leave a module alone.
    """
    makers = (_linear, _rms_norm, _gated_mlp, _rotary_angles, _attention)
    modules = [module for module in modules if not is_patched(module)]
    found: dict[nn.Module, Callable] = {}
    for module in modules:
        for make in makers:
            forward = make(module, operations)
            if forward is not None:
                found[module] = forward
    for module in filter(_is_decoder_layer, modules):
        if module.self_attn in found and not _hands_on_the_cache(module):
            del found[module.self_attn]
    if operations.add_rms_norm is not None:
        for module in modules:
            forward = _decoder_layer(module, operations, found)
            if forward is not None:
                found[module] = forward
    return Patches(found.items())


def is_rms_norm(module: nn.Module) -> bool:
    """Whether this looks like a norm over rows with a weight."""
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(getattr(module, "variance_epsilon", None), float)
        and isinstance(getattr(module, "weight", None), Tensor)
    )


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether this looks like an MLP with a gate."""
    names = ("gate_proj", "up_proj", "down_proj")
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def is_rotary(module: nn.Module) -> bool:
    """Whether this looks like a rotary embedding whose frequencies stay as they are."""
    kind = getattr(module, "rope_type", "default")
    return (
        isinstance(getattr(module, "inv_freq", None), Tensor)
        and isinstance(getattr(module, "attention_scaling", None), (float, int))
        and isinstance(kind, str)
        and "dynamic" not in kind
        and kind != "longrope"
    )


def _is_attention(module: nn.Module) -> bool:
    layers = [getattr(module, name, None) for name in _PROJECTIONS]
    return (
        all(isinstance(layer, nn.Module) for layer in layers)
        and isinstance(getattr(module, "layer_idx", None), int)
        and isinstance(getattr(module, "head_dim", None), int)
        and isinstance(getattr(module, "scaling", None), float)
    )


def _is_decoder_layer(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in _OF_A_LAYER]
    return all(isinstance(part, nn.Module) for part in parts)


def _linear(module: nn.Module, operations: Operations) -> Callable | None:
    return operations.linear(module)


def _rms_norm(module: nn.Module, operations: Operations) -> Callable | None:
    if not is_rms_norm(module) or not operations.takes_weight(module.weight, 1):
        return None

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        if not operations.takes_rows(hidden_states, self.weight, self.weight.shape[0]):
            return type(self).forward(self, hidden_states)
        return operations.rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward if _agrees(module, forward, module.weight, 1e-6) else None


def _gated_mlp(module: nn.Module, operations: Operations) -> Callable | None:
    if not is_gated_mlp(module):
        return None
    layers = (module.gate_proj, module.up_proj, module.down_proj)
    if not all(operations.takes_layer(layer) for layer in layers):
        return None

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        gate = self.gate_proj
        if not operations.takes_rows(x, gate.weight, gate.in_features):
            return type(self).forward(self, x)
        return operations.gated_mlp(self, x)

    return forward if _agrees(module, forward, layers[0].weight, 1e-5) else None


def _rotary_angles(module: nn.Module, operations: Operations) -> Callable | None:
    if not is_rotary(module) or not operations.takes_weight(module.inv_freq, 1):
        return None
    device = module.inv_freq.device
    has_sections = hasattr(module, "mrope_section")
    positions = _random(_generator(), 3, 2, 7, device=device).mul(1000).abs().long()
    positions = positions if has_sections else positions[0]

    def same(forward: Callable[..., Angles]) -> bool:
        for dtype in operations.dtypes:
            x = torch.zeros(2, 7, 1, dtype=dtype, device=device)
            theirs = type(module).forward(module, x, positions)
            if not _are_close(forward(module, x, positions), theirs, 1e-6):
                return False
        return True

    for forward in operations.rotary_forwards(module):
        if _holds(module, lambda forward=forward: same(forward)):
            return forward
    return None


def _attention(module: nn.Module, operations: Operations) -> Callable | None:
    if not _is_attention(module):
        return None
    layers = [getattr(module, name) for name in _PROJECTIONS]
    if not all(operations.takes_layer(layer) for layer in layers):
        return None

    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cache, angles = kwargs.get(CACHE), kwargs.get("position_embeddings")
        row = (*hidden_states.shape[:2], self.head_dim)
        is_step = (
            not args
            and kwargs.get("lvspec_step") is not None
            and isinstance(cache, SlotCache)
            and angles is not None
            and operations.takes_all(cache.k, cache.v, hidden_states, *angles)
            and all(tuple(x.shape) == row for x in angles)
        )
        if not is_step:
            return type(self).forward(self, hidden_states, *args, **kwargs)
        projected = [layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        for index, name in enumerate(("q_norm", "k_norm")):
            norm = getattr(self, name, None)
            if norm is not None:  # of heads
                heads = projected[index].unflatten(2, (-1, self.head_dim))
                projected[index] = norm(heads).flatten(2)
        query = operations.rotate_and_write(
            *projected, *angles, cache.k, cache.v, self.layer_idx, cache.kv_len
        )
        key, value = cache.k[self.layer_idx], cache.v[self.layer_idx]
        del kwargs[CACHE], kwargs["position_embeddings"]
        kwargs |= {"attention_mask": None, "scaling": self.scaling}
        out, _ = lvspec_attention(self, query, key, value, **kwargs)
        return self.o_proj(out.reshape(*row[:2], -1)), None

    def run(code: Callable) -> tuple[Tensor, ...]:
        """What `code` returns, writes and scores for two sequences in a small cache."""
        kv_heads = layers[1].out_features // module.head_dim
        generator, like = _generator(), _like(layers[0].weight)
        device = like["device"]
        hidden = _random(generator, 2, 3, layers[0].in_features, **like)
        angles = tuple(_random(generator, 2, 2, 3, module.head_dim, **like))
        shape = (module.layer_idx + 1, 2, kv_heads, 8, module.head_dim)
        k, v = (_random(generator, *shape, **like) for _ in range(2))
        visual = (torch.arange(8, device=device) % 2).to(torch.uint8).repeat(2, 1)
        kv_len = torch.tensor([2, 4], dtype=torch.int32, device=device)
        positions = torch.zeros(3, 2, 8, dtype=torch.long, device=device)
        cache = SlotCache.over(k, v, kv_len, visual, positions)
        cache.begin_step(3)
        ancestors = chain_ancestors(3, batch_size=2, device=device)
        step = AttentionStep(kv_len, ancestors, visual, True)
        out, _ = code(
            module,
            hidden,
            attention_mask=None,
            position_embeddings=angles,
            lvspec_step=step,
            **{CACHE: cache},
        )
        return out, k, v, *step.masses, *step.peaks

    def same() -> bool:
        with _attention_set(module):
            return _are_close(run(forward), run(type(module).forward), 1e-5)

    return forward if _holds(module, same) else None


def _decoder_layer(
    module: nn.Module, operations: Operations, found: dict[nn.Module, Callable]
) -> Callable | None:
    """A layer's first sum and its second norm in one."""
    if not _is_decoder_layer(module) or module.post_attention_layernorm not in found:
        return None
    norm, attention = module.post_attention_layernorm, module.self_attn
    if not isinstance(getattr(attention, "head_dim", None), int):
        return None
    norm_forward = found[norm]

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        norm = self.post_attention_layernorm
        weight = norm.weight
        takes = operations.takes_rows(hidden_states, weight, weight.shape[0])
        if args or not takes or not has_forward(norm, norm_forward):
            return type(self).forward(self, hidden_states, *args, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        total, normed = operations.add_rms_norm(
            attended, hidden_states, weight, norm.variance_epsilon
        )
        return total + self.mlp(normed)

    def run(code: Callable) -> tuple[Tensor]:
        generator, like = _generator(), _like(norm.weight)
        hidden = _random(generator, 2, 3, norm.weight.shape[0], **like)
        angles = tuple(_random(generator, 2, 2, 3, attention.head_dim, **like))
        return (code(module, hidden, attention_mask=None, position_embeddings=angles),)

    def same() -> bool:
        with _attention_set(attention), fused([(norm, norm_forward)]):
            return _are_close(run(forward), run(type(module).forward), 1e-5)

    return forward if _holds(module, same) else None


def _hands_on_the_cache(layer: nn.Module) -> bool:
    """Whether a layer's attention is given the cache under the name that its patch looks for.

    Without it the patch would be called and leave all to HF's code. A layer with patches of others
    is taken for one that does: they are not to see a call that nobody made.
    """
    if any(map(is_patched, layer.children())):
        return True
    cache, seen = object(), []

    def forward(self: nn.Module, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        seen.append(kwargs.get(CACHE))
        return hidden_states, None

    def is_handed_on() -> bool:
        weight = layer.self_attn.q_proj.weight
        hidden = torch.zeros(1, 1, layer.self_attn.q_proj.in_features, **_like(weight))
        with fused([(layer.self_attn, forward)]):
            given = {"attention_mask": None, "position_embeddings": None, CACHE: cache}
            type(layer).forward(layer, hidden, **given)
        if seen != [cache]:
            raise TypeError(f"expected a layer that hands {CACHE!r} on to its attention")
        return True

    return _holds(layer.self_attn, is_handed_on)


@contextmanager
def _attention_set(module: nn.Module) -> Iterator[None]:
    before = module.config._attn_implementation
    module.config._attn_implementation = NAME
    try:
        yield
    finally:
        module.config._attn_implementation = before


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _random(
    generator: torch.Generator,
    *shape: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=generator, device="cpu").to(device, dtype)


def _like(weight: Tensor) -> dict[str, Any]:
    return {"device": weight.device, "dtype": weight.dtype}


def _agrees(module: nn.Module, forward: Callable, weight: Tensor, tolerance: float) -> bool:
    """Whether `forward` gives what the module's own code does, for small and for large numbers."""

    def same() -> bool:
        # Products of thousands are more than a float16 can be.
        most = 1 if weight.dtype == torch.float16 else 3
        rows = _random(_generator(), 1, 3, weight.shape[-1], device=weight.device)
        scales = torch.logspace(-3, most, 3, device=weight.device)
        rows = (rows * scales[:, None]).to(weight.dtype)
        return all(
            _are_close((forward(module, x),), (type(module).forward(module, x),), tolerance)
            for x in (rows, rows[:, 1:2])
        )

    return _holds(module, same)


def _holds(module: nn.Module, condition: Callable[[], bool]) -> bool:
    """Whether it does; where it raises, as a kernel that does not compile, that is said."""
    try:
        return condition()
    except Exception as error:
        _warn_once(type(module).__name__, f"{type(error).__name__}: {error}")
        return False


@functools.cache
def _warn_once(name: str, error: str) -> None:
    """Not once a layer."""
    warnings.warn(
        f"lvspec: {name} is run by HF's code, slower, for what would stand in for it failed: "
        f"{error}",
        RuntimeWarning,
        stacklevel=3,
    )


def _are_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> bool:
    """Up to `tolerance` times the largest number of a row; types of 16 bits up to one rounding.

    There both round at the same steps, and only now and then apart: a sixteenth of a rounding on
    average.
    """
    return len(ours) == len(theirs) and all(
        x.shape == y.shape and x.dtype == y.dtype and _is_close(x, y, tolerance)
        for x, y in zip(ours, theirs, strict=True)
    )


def _is_close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    eps = torch.finfo(x.dtype).eps
    error, size = (x.float() - y.float()).abs(), y.float().abs()
    if not bool((error.amax(-1) <= max(tolerance, eps) * size.amax(-1)).all()):
        return False
    return tolerance > eps or bool(error.mean() <= eps / 16 * size.mean())
