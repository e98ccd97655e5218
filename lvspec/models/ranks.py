"""The processes over which tensor parallelism spreads a target, and what they tell each other.

Every process (a *rank*) runs the same loop. Of the target it has its part of every head and every
weight, of the draft all. That they never part is seen to here: what a step goes on with is what the
first rank found. On a GPU all of it is part of the iteration that is captured; nothing here reads
anything back but `value`, for what the host decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lvspec.environment import number_on_machine
from lvspec.models.pulse import Pulse

Value = TypeVar("Value")

_CPU = torch.device("cpu")
PATIENCE = timedelta(minutes=10)
"""A rank that lives but does not come to where the others wait for it is given up after this."""


class Ranks:
    """This process among those that share a model.

    Args:
        group: Of `torch.distributed`; None: this process is alone, and everything is as it is.
        device: Where this process computes.
        pulse: Tells the others that this process lives, and ends it where one of them does not.

    Attributes:
        number: Of this process, from 0; the first one's word counts, and it alone prints.
        size: How many there are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device = _CPU,
        pulse: Pulse | None = None,
    ) -> None:
        self.group, self.device, self._pulse = group, device, pulse
        self.number = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def sum(self, part: Tensor) -> Tensor:
        """The sum of what every rank gives, in place of `part`."""
        if self.size > 1:
            dist.all_reduce(part, group=self.group)
        return part

    def all(self, is_so: bool) -> bool:
        """Whether it is so on every rank. Waits for the device."""
        if self.size == 1:
            return is_so
        found = torch.full((1,), int(not is_so), device=self.device)
        return not bool(self.sum(found))

    def mean_of_heads(self, masses: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of attention `[L, B, Hq, S]`, of all ranks' heads: `[L, B, 1, S]`, their mean.

        One process has its scores back as they are.
        """
        if self.size == 1:
            return masses, peaks
        both = torch.stack([masses.mean(2, keepdim=True), peaks.mean(2, keepdim=True)])
        return tuple((self.sum(both) / self.size).unbind(0))

    def first(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The first rank's tensors, in one message; all have the same shapes and dtypes there."""
        if self.size == 1:
            return tensors
        # The widest first, so that each begins where its dtype may.
        order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
        # Copied: what has one element is contiguous with any stride, and is no row of bytes.
        rows = (tensors[i].flatten().clone(memory_format=torch.contiguous_format) for i in order)
        parts = [row.view(torch.uint8) for row in rows]
        message = torch.cat(parts)
        dist.broadcast(message, group=self.group, group_src=0)
        found = list(tensors)
        for i, part in zip(order, message.split([len(part) for part in parts]), strict=True):
            found[i] = part.view(tensors[i].dtype).view(tensors[i].shape)
        return tuple(found)

    def value(self, value: Value) -> Value:
        """The first rank's value on the host, anything that can be pickled. Waits for the device.

        Raises:
            RuntimeError: A rank is gone.
        """
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, group=self.group, group_src=0)
        return held[0]

    def gather(self, part: Tensor, size: int) -> Tensor:
        """Columns of all ranks side by side, `[..., size]`, of this one's `[..., n]`.

        `size` was cut as `torch.chunk` cuts: the last ranks may have fewer columns than the others.
        """
        most = -(-size // self.size)
        rows = nn.functional.pad(part, (0, most - part.shape[-1])).contiguous()
        found = rows.new_empty(self.size, *rows.shape)
        dist.all_gather(list(found.unbind(0)), rows, group=self.group)
        return found.movedim(0, -2).flatten(-2)[..., :size]

    def fail(self, error: BaseException) -> None:
        """This rank cannot go on: the others need not wait to find out."""
        if self._pulse is not None:
            self._pulse.fail(error)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """A context whose errors the others are told of."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """All that is left to do with the others: who is through waits for them."""
        with self.telling():
            yield
            if self.size > 1:
                dist.barrier(group=self.group)
                dist.destroy_process_group()


ALONE = Ranks()

_RANKS: WeakKeyDictionary[nn.Module, Ranks] = WeakKeyDictionary()


def ranks_of(text: nn.Module) -> Ranks:
    """Those that share a text model; `ALONE` where it is whole."""
    return _RANKS.get(text, ALONE)


def shared_by(text: nn.Module, ranks: Ranks) -> None:
    """From now on `ranks_of(text)` are these."""
    _RANKS[text] = ranks


def parts_of_heads(text: nn.Module) -> tuple[int, int]:
    """Heads of queries and of keys that this process has of a text model's."""
    config, size = text.config, ranks_of(text).size
    return config.num_attention_heads // size, config.num_key_value_heads // size


def join() -> Ranks:
    """Meet the processes that torchrun has started with this one.

    Returns:
        All of them; this one computes on the GPU of its number on this machine, or on the CPU.

    Raises:
        ValueError: torchrun has not started this process.
        RuntimeError: The others do not come.
    """
    number = number_on_machine("tensor_parallel")
    on_cuda = torch.cuda.is_available()
    if on_cuda and number >= torch.cuda.device_count():
        raise ValueError(
            "tensor_parallel: expected a GPU for every process (--nproc-per-node), got process "
            f"{number} on a machine with {torch.cuda.device_count()}"
        )
    device = torch.device("cuda", number) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            timeout=PATIENCE,
            device_id=device if on_cuda else None,
        )
    pulse = Pulse.begin() if dist.get_world_size() > 1 else None
    return Ranks(dist.group.WORLD, device, pulse)
