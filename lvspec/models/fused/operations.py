"""What a set of operations has to offer to stand in for the parts of a text model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]
"""Cosines and sines `[B, S, D]`."""


class Operations(ABC):
    """The operations for tensors of some types on some devices.

    Attributes:
        dtypes: The float types that they take.
        add_rms_norm: As `lvspec.reference.add_rms_norm`, or None.
    """

    dtypes: tuple[torch.dtype, ...]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] | None = None

    @abstractmethod
    def takes_device(self, device: torch.device) -> bool:
        """Whether tensors may be there."""

    @abstractmethod
    def takes_layer(self, layer: Any) -> bool:
        """Whether this may be the linear layer of a gated MLP or of attention."""

    @abstractmethod
    def takes_rows(self, x: Tensor, weight: Tensor, size: int) -> bool:
        """Whether rows of `size` numbers may be multiplied with this weight."""

    def linear(self, layer: nn.Module) -> Callable | None:
        """A forward for a linear layer, if there is one."""
        return None

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `lvspec.reference.rms_norm`."""

    @abstractmethod
    def gated_mlp(self, mlp: nn.Module, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)), with the layers of `mlp`."""

    @abstractmethod
    def rotary_forwards(self, rotary: nn.Module) -> Iterator[Callable[..., Angles]]:
        """Forwards that may be the one of this rotary embedding."""

    @abstractmethod
    def rotate_and_write(
        self,
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
        """As `lvspec.reference.rotate_and_write`."""

    def takes_weight(self, x: Any, dim: int) -> bool:
        """Whether this is an ordinary tensor of the right type on the right device."""
        return (
            type(x) in (Tensor, nn.Parameter, nn.Buffer)
            and x.dim() == dim
            and x.dtype in self.dtypes
            and self.takes_device(x.device)
            and x.is_contiguous()
        )

    def takes_all(self, *tensors: Tensor) -> bool:
        """Whether these are of one type, and that is one of ours."""
        dtype = tensors[0].dtype
        return dtype in self.dtypes and all(x.dtype == dtype for x in tensors)
