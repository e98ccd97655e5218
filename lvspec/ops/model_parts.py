"""The small operations inside HF's text models.

`models/fused` calls them as `torch.ops.lvspec.<name>` with tensors of which it knows shapes and
dtypes, so they have no checked functions. Their meaning is that of the function of the same name in
`lvspec.reference.model_parts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec import reference
from lvspec.ops.registry import define


def _like_x(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _two_like_x(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _like_gate(gate: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape[1:], 2 * frequencies.shape[0])
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)


def _rotated(q: Tensor, cos: Tensor) -> Tensor:
    batch_size, num_slots, head_dim = cos.shape
    return q.new_empty((batch_size, q.shape[2] // head_dim, num_slots, head_dim))


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _gated_product(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // 2))


def _nothing() -> None:
    return None


def _rotated_of_qkv(qkv: Tensor, cos: Tensor, k_cache: Tensor) -> Tensor:
    batch_size, num_slots, head_dim = cos.shape
    num_q_heads = qkv.shape[2] // head_dim - 2 * k_cache.shape[2]
    return qkv.new_empty((batch_size, num_q_heads, num_slots, head_dim))


define("rms_norm", reference.rms_norm, _like_x)
define("add_rms_norm", reference.add_rms_norm, _two_like_x)
define("silu_multiply", reference.silu_multiply, _like_gate)
define("rotary_angles", reference.rotary_angles, _angles)
define("rotate_and_write", reference.rotate_and_write, _rotated, written=("k_cache", "v_cache"))
define(
    "rotate_qkv_and_write",
    reference.rotate_qkv_and_write,
    _rotated_of_qkv,
    written=("k_cache", "v_cache"),
)
define("norm_linear", reference.norm_linear, _product)
define("norm_gated_linear", reference.norm_gated_linear, _gated_product)
define("linear_add_", reference.linear_add_, _nothing, written=("residual",))
