"""Parts of HF's text models as single C++ operations, while a pass over them is recorded.

A pass of a few slots through a small model is some sixty operations a layer, most of them over
before their call is. Norms, gated MLPs and rotary embeddings have one operation each in `csrc/`.
What they stand for is recognised by its parts and by what it computes: on random numbers the
operation must give what the module's own code gives, or the module is left as it is. Patches are on
the modules in hand (the rotation: on their file's function) and gone when the recording is over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_SMALL_ROWS = 16
"""Rows up to which csrc/linear.h is the faster one, on processors with vectors of 16 numbers."""

_ROTATION = "apply_rotary_pos_emb"


@contextmanager
def fused(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context the recognised parts of `modules` call operations of `csrc/`.

    Args:
        modules: All of them, not only the outermost. Other types than float32 are left alone.
    """
    modules = list(modules)
    with ExitStack() as patches:
        for module in modules:
            for make in (_rms_norm, _gated_mlp, _rotary_angles):
                forward = make(module)
                if forward is not None:
                    patches.enter_context(_replaced(module, "forward", MethodType(forward, module)))
        for name in {type(module).__module__ for module in modules}:
            rotation = _rotation(getattr(sys.modules[name], _ROTATION, None))
            if rotation is not None:
                patches.enter_context(_replaced(sys.modules[name], _ROTATION, rotation))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


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
        if 2 <= x.shape[0] * x.shape[1] <= MAX_SMALL_ROWS:
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
        if x.dtype != torch.float32 or position_ids.dim() != 3 or position_ids.shape[0] != 3:
            return type(self).forward(self, x, position_ids)
        return torch.ops.lvspec.cpu_rotary_angles(
            position_ids.long(), self.inv_freq, table, self.attention_scaling
        )

    def same() -> bool:
        positions = torch.randint(0, 3000, (3, 2, 7), generator=_generator())
        x = torch.zeros(2, 7, 1)
        theirs = type(module).forward(module, x, positions)
        return _are_close(forward(module, x, positions), theirs, 1e-6)

    return forward if _holds(same) else None


def _rotation(original: Callable | None) -> Callable | None:
    if original is None:
        return None

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        batch_size, _, num_slots, head_dim = q.shape if q.dim() == 4 else (0,) * 4
        row = (batch_size, num_slots, head_dim)
        is_plain = (
            not args
            and not kwargs
            and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (q, k, cos, sin))
            and k.dim() == 4
            and tuple(cos.shape) == tuple(sin.shape) == row
            and (k.shape[0], *k.shape[2:]) == row
            and head_dim % 2 == 0
        )
        if not is_plain:
            return original(q, k, cos, sin, *args, **kwargs)
        return torch.ops.lvspec.cpu_rotate(q, k, cos, sin)

    def same() -> bool:
        shapes = (2, 4, 3, 8), (2, 2, 3, 8), (2, 3, 8), (2, 3, 8)
        given = [torch.randn(shape, generator=_generator()) for shape in shapes]
        return _are_close(rotate(*given), original(*given), 1e-6)

    return rotate if _holds(same) else None


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


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _agrees(module: nn.Module, forward: Callable, size: int, tolerance: float) -> bool:
    """Whether `forward` gives what the module's own code does, for small and for large numbers."""
    if "forward" in vars(module):  # someone else's patch
        return False

    def same() -> bool:
        many = torch.randn(2, 7, size, generator=_generator()) * torch.logspace(-3, 3, 7)[:, None]
        return all(
            _are_close((forward(module, x),), (type(module).forward(module, x),), tolerance)
            for x in (many, many[:1, 3:4])
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
