"""Copies of float32 weights in 16 bits, where those hold the same numbers: half the bytes to read.

What was published in float16 or bfloat16 and is computed in float32 has such weights. A copy is
packed for `csrc/packed_linear.h`, and it is as old as the moment when it was made: whoever uses it
asks whether the weights are still those.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_BYTES = 4 << 30
"""Of all copies of a model: as much memory again is not everybody's."""

_LOOKED_AT = 4096
"""Weights of a matrix that are tried before all of them are."""

_SAMPLES = 64
"""Weights of a matrix that are compared whenever a call begins. (Whoever trains, merges an adapter
or loads other weights changes all of them.)"""

_HALVES = (torch.float16, torch.bfloat16)


class CompactWeights:
    """The copies of one model."""

    def __init__(self) -> None:
        self.count = 0
        self._num_bytes = 0
        self._sources: list[tuple[Tensor, int]] = []
        self._samples: list[tuple[Tensor, Tensor]] = []
        self._seen: tuple[Tensor, Tensor] | None = None

    def add(self, *parts: Tensor, gated: bool = False) -> Tensor | None:
        """A copy of float32 matrices `[O, I]`, one below the other, packed for one product.

        Args:
            parts: The matrices.
            gated: They are gates and what those multiply.

        Returns:
            None where 16 bits do not hold the numbers, or there are enough copies.
        """
        size = sum(part.numel() for part in parts) * 2
        if self._num_bytes + size > MOST_BYTES or not _may_be_exact(parts):
            return None
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        found = torch.ops.lvspec.cpu_pack(rows, gated)
        if found.dtype not in _HALVES:
            return None
        self.count += len(parts)
        self._num_bytes += size
        self._sources += [(part, _version(part)) for part in parts]
        self._samples += [_sample(part) for part in parts]
        self._seen = None
        return found

    def are_current(self) -> bool:
        """Whether the weights are those that were copied, as far as a look shows.

        By torch's count of what happens to a tensor in place, and by some numbers of each: what is
        written through `.data` is not counted.
        """
        if not self._sources:
            return True
        if self._seen is None:
            addresses, numbers = zip(*self._samples, strict=True)
            self._seen = torch.cat(addresses), torch.cat(numbers)
        return all(_version(part) == then for part, then in self._sources) and (
            torch.ops.lvspec.cpu_unchanged(*self._seen)
        )


def _sample(part: Tensor) -> tuple[Tensor, Tensor]:
    """Addresses of some numbers, and the numbers."""
    at = torch.arange(_SAMPLES, dtype=torch.float64).mul_(part.numel() / _SAMPLES).long()
    return part.data_ptr() + at * part.element_size(), part.detach().flatten()[at]


def _may_be_exact(parts: tuple[Tensor, ...]) -> bool:
    first = [part.detach().flatten()[:_LOOKED_AT] for part in parts]
    return any(all(torch.equal(x.to(half).float(), x) for x in first) for half in _HALVES)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
