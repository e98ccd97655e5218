"""write_float8: rows of keys and values into a cache of a byte a number.

`lvspec.models.cache` calls it with tensors of which it knows shapes and dtypes, so nothing is
checked. The C++ leaves it to PyTorch: on a CPU its time is lost beside a pass's products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec.ops.backends import float_dtypes
from lvspec.ops.registry import define
from lvspec.reference import float8


def write_float8(
    keys: Tensor,
    values: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layer: int,
    kv_len: Tensor,
) -> None:
    """The specification for keys of a dtype that the backend does not take."""
    is_taken = keys.dtype in float_dtypes(keys.device.type)
    run = torch.ops.lvspec.write_float8 if is_taken else float8.write_float8
    run(keys, values, k_scale, v_scale, k_cache, v_cache, layer, kv_len)


def _shapes() -> None:
    return None


define("write_float8", float8.write_float8, _shapes, written=("k_cache", "v_cache"))
