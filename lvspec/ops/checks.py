"""Checks of arguments that several operations have; they read attributes only, never a device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lvspec.ops.backends import float_dtypes
from lvspec.policy import MAX_TOP_K

STATISTICS = (torch.float32, torch.float64)
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
INT64 = (torch.int64,)
UINT8 = (torch.uint8,)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float type of sums and statistics: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fail(argument: str, expected: str, got: Any) -> NoReturn:
    """Raise the ValueError that every argument which does not fit ends in."""
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def check(
    argument: str,
    tensor: Tensor,
    dtypes: Collection[torch.dtype],
    shape: Sequence[int],
    device: torch.device,
) -> None:
    """Raise unless the tensor has one of the dtypes, the shape and the device."""
    if tensor.dtype not in dtypes:
        fail(argument, f"dtype {names(dtypes)}", tensor.dtype)
    if tensor.shape != shape:
        fail(argument, f"shape {tuple(shape)}", tuple(tensor.shape))
    if tensor.device != device:
        fail(argument, f"device {device}", tensor.device)


def check_float(argument: str, tensor: Tensor) -> None:
    """Raise unless the backend of the tensor's device takes its dtype."""
    dtypes = float_dtypes(tensor.device.type)
    if tensor.dtype not in dtypes:
        fail(argument, f"dtype {names(dtypes)}", tensor.dtype)


def check_workspace(workspace: Tensor | None, device: torch.device, size: int) -> None:
    """Raise unless there are `size` bytes of scratch, or no workspace at all."""
    if workspace is None:
        return
    if workspace.dtype != torch.uint8 or workspace.dim() != 1 or not workspace.is_contiguous():
        got = f"{workspace.dtype} {tuple(workspace.shape)}"
        fail("workspace", "contiguous uint8 of one dimension", got)
    if workspace.device != device:
        fail("workspace", f"device {device}", workspace.device)
    if workspace.shape[0] < size:
        fail("workspace", f"at least {size} bytes (see workspace_size)", workspace.shape[0])


def check_heads(num_q_heads: int, num_kv_heads: int) -> None:
    """Raise unless every KV head has the same number of query heads."""
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        fail("q", f"a multiple of Hkv = {num_kv_heads} heads", num_q_heads)


def check_top_k(top_k: int, vocabulary: int) -> None:
    """Raise unless that many best tokens can be had of a row."""
    most = min(MAX_TOP_K, vocabulary)
    if not 1 <= top_k <= most:
        fail("top_k", f"1 to {most} for a vocabulary of {vocabulary}", top_k)


def names(dtypes: Collection[torch.dtype]) -> str:
    """Of dtypes, for a message."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
