"""Schemas and shape functions of the small operations inside HF's text models.

`lvspec.fused` calls them as `torch.ops.lvspec.<name>` with tensors of which it knows shapes and
dtypes, so they have no checked function in `lvspec.ops`. Their meaning is that of the function of
the same name in `lvspec.reference.model_parts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec.reference import model_parts

SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm": (
        "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor total, Tensor norm)"
    ),
    "silu_multiply": "(Tensor gate, Tensor up) -> Tensor",
    "rotary_angles": (
        "(Tensor positions, Tensor frequencies, Tensor dimensions, float scaling, "
        "ScalarType dtype) -> (Tensor cos, Tensor sin)"
    ),
    "rotate_and_write": (
        "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
        "Tensor(b!) v_cache, int layer, Tensor kv_len) -> Tensor"
    ),
}


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _add_rms_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _silu_multiply_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _rotary_angles_fake(
    positions: Tensor, frequencies: Tensor, dimensions: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape[1:], 2 * frequencies.shape[0])
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)


def _rotate_and_write_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layer: int,
    kv_len: Tensor,
) -> Tensor:
    batch_size, num_slots, head_dim = cos.shape
    return q.new_empty((batch_size, q.shape[2] // head_dim, num_slots, head_dim))


def register(library: torch.library.Library) -> None:
    """Define every operation, for all devices by its specification."""
    fakes = {
        "rms_norm": _rms_norm_fake,
        "add_rms_norm": _add_rms_norm_fake,
        "silu_multiply": _silu_multiply_fake,
        "rotary_angles": _rotary_angles_fake,
        "rotate_and_write": _rotate_and_write_fake,
    }
    for name, fake in fakes.items():
        library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, getattr(model_parts, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"lvspec::{name}", fake, lib=library)
