"""The parts of a decoder pass, by name: one function each, and who computes it.

`models/plan.py` calls them with tensors of which it knows shapes and dtypes, so nothing is checked.
Their meaning, shapes and types are those of the functions of the same names in
`lvspec.reference.model_parts`. The backend computes what it takes; the C++ takes float32, and what
it does not take is computed by PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lvspec import reference
from lvspec.ops.backends import active_backend, float_dtypes
from lvspec.ops.registry import define

FEW_ROWS = 16
"""Rows up to which products are lvspec's own on CUDA devices; the libraries take over behind it."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    run = torch.ops.lvspec.rms_norm if _is_taken(x) else reference.rms_norm
    return run(x, weight, eps)


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    run = torch.ops.lvspec.silu_multiply if _is_taken(gate) else reference.silu_multiply
    return run(gate, up)


def rotary_angles(
    positions: Tensor, frequencies: Tensor, dimensions: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    is_taken = _takes(frequencies.device.type, dtype)
    run = torch.ops.lvspec.rotary_angles if is_taken else reference.rotary_angles
    return run(positions, frequencies, dimensions, scaling, dtype)


def rotate_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    layer: int,
    kv_len: Tensor,
) -> Tensor:
    run = torch.ops.lvspec.rotate_and_write if _is_taken(qkv) else reference.rotate_and_write
    return run(qkv, cos, sin, q_norm, k_norm, eps, k_cache, v_cache, layer, kv_len)


def norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if _is_one_kernel(x):
        return torch.ops.lvspec.norm_linear(x, norm_weight, eps, weight, bias)
    return functional.linear(rms_norm(x, norm_weight, eps), weight, bias)


def norm_gated_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    if _is_one_kernel(x):
        return torch.ops.lvspec.norm_gated_linear(x, norm_weight, eps, weight)
    products = functional.linear(rms_norm(x, norm_weight, eps), weight)
    return silu_multiply(*products.chunk(2, dim=-1))


def linear_add_(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    if _is_one_kernel(x):
        torch.ops.lvspec.linear_add_(x, weight, residual)
    elif x.device.type == "cpu":
        residual += functional.linear(x, weight)  # rounded twice, as HF's two operations do
    else:
        residual.addmm_(x, weight.t())


def _takes(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the backend of a device computes in this dtype."""
    backend = active_backend(device_type)
    if backend == "cpp":
        return dtype == torch.float32
    return backend == "triton" and dtype in float_dtypes(device_type)


def _is_taken(x: Tensor) -> bool:
    return _takes(x.device.type, x.dtype)


def _is_one_kernel(x: Tensor) -> bool:
    """Whether products of these rows have kernels of their own."""
    device_type = x.device.type
    is_few = x.shape[0] <= FEW_ROWS and active_backend(device_type) == "triton"
    return is_few and x.dtype in float_dtypes(device_type)


def _like_x(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _like_gate(gate: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape[1:], 2 * frequencies.shape[0])
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)


def _rotated(qkv: Tensor, cos: Tensor, k_cache: Tensor) -> Tensor:
    batch_size, num_slots, head_dim = cos.shape
    num_q_heads = qkv.shape[2] // head_dim - 2 * k_cache.shape[2]
    return qkv.new_empty((batch_size, num_q_heads, num_slots, head_dim))


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _gated_product(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // 2))


def _nothing() -> None:
    return None


define("rms_norm", reference.rms_norm, _like_x)
define("silu_multiply", reference.silu_multiply, _like_gate)
define("rotary_angles", reference.rotary_angles, _angles)
define("rotate_and_write", reference.rotate_and_write, _rotated, written=("k_cache", "v_cache"))
define("norm_linear", reference.norm_linear, _product)
define("norm_gated_linear", reference.norm_gated_linear, _gated_product)
define("linear_add_", reference.linear_add_, _nothing, written=("residual",))
