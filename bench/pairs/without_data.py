"""An iteration of a pair of real shapes on tensors without data: what it launches, and no device.

The models, the engine and the launchers of Triton's kernels run as on a GPU, over fakes that have
shapes, types and a device. What asks for a value while models are looked at (whether a part
computes what HF's does) is told that it agrees; within an iteration nothing may ask.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ops.cuda_guard import accept_cuda
from pairs.pairs import Pair
from pairs.random_models import build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lvspec.kernels
from lvspec import ops
from lvspec.config import DecodeConfig
from lvspec.engine.engine import Engine
from lvspec.engine.roles import Roles
from lvspec.engine.sequence import Request, Sequence
from lvspec.engine.stats import DecodeStats
from lvspec.engine.stopping import Stopping
from lvspec.kernels import launch
from lvspec.models.cache import SlotCache, most_pieces
from lvspec.models.model import Model
from lvspec.phases.draft import CachedDrafter, make_drafter
from lvspec.policy import AcceptancePolicy
from lvspec.tree_shapes import NAMED_TREES, StaticTree

CUDA = torch.device("cuda")

Launch = Callable[[Any, tuple[int, ...], dict[str, Any]], None]
"""What is done in place of a launch: of a kernel, on a grid, with these arguments."""

_COMPARISONS = (torch.ops.aten.allclose.default, torch.ops.aten.equal.default)
_VALUE = torch.ops.aten._local_scalar_dense.default


class OnDevice(TorchDispatchMode):
    """lvspec's operations are their launchers; `seen` is told of every operation of torch's.

    Args:
        seen: Called with it; None: nobody is.
        agrees: Whether truth values may be asked for, and are true.
    """

    def __init__(self, seen: Callable[[Any], None] | None = None, *, agrees: bool = False) -> None:
        super().__init__()
        self._seen, self._agrees = seen, agrees

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "lvspec":
            name = function.overloadpacket.__name__
            launcher = getattr(importlib.import_module(f"lvspec.kernels.{name}"), name)
            with self:  # what it asks of torch is launched, too
                return launcher(*args, **kwargs)
        if function.namespace == "aten":
            with self:  # of what is made of others, the others are seen
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if self._agrees and function in _COMPARISONS:
            return True
        if self._agrees and function is _VALUE and args[0].dtype == torch.bool:
            return True
        if self._seen is not None:
            self._seen(function)
        return function(*args, **kwargs)


class _StandIn:
    """A kernel whose launches something else is done for."""

    def __init__(self, kernel: Any, launched: Launch) -> None:
        self._kernel, self._launched = kernel, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self._launched(self._kernel, grid, arguments)


@contextlib.contextmanager
def launching(launched: Launch, device_class: str) -> Iterator[None]:
    """Launchers of `lvspec.kernels` do this, as on a device of this class."""
    replaced = [(launch, "device_class", launch.device_class)]
    replaced.append((launch, "device_guard", launch.device_guard))
    for found in pkgutil.iter_modules(lvspec.kernels.__path__):
        module = importlib.import_module(f"lvspec.kernels.{found.name}")
        for name, value in vars(module).items():
            if name.endswith("_kernel"):
                replaced.append((module, name, value))
    try:
        launch.device_class = lambda device: device_class
        launch.device_guard = lambda tensor: contextlib.nullcontext()
        for module, name, kernel in replaced[2:]:
            setattr(module, name, _StandIn(kernel, launched))
        yield
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


class _Event:
    def record(self) -> None:
        """There is no device to record one."""

    def synchronize(self) -> None:
        """There is none to wait for."""


def _set_up(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
    """What `torch.tensor` makes, without the numbers: it would look at those of fakes."""
    rows, shape = data, []
    while isinstance(rows, (list, tuple)):
        shape.append(len(rows))
        rows = rows[0] if rows else 0.0
    kind = dtype or {bool: torch.bool, int: torch.int64, float: torch.float32}[type(rows)]
    return torch.zeros(shape, dtype=kind, device=device)


def _plain_type(value: Any) -> type:
    """Of a fake that of an ordinary tensor: a subclass would be left to HF's code."""
    if isinstance(value, FakeTensor):
        return nn.Parameter if isinstance(value, nn.Parameter) else torch.Tensor
    return type(value)


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    """`lvspec.models` takes fakes for ordinary tensors."""
    modules = [module for name, module in sys.modules.items() if name.startswith("lvspec.models")]
    try:
        for module in modules:
            module.type = _plain_type
        yield
    finally:
        for module in modules:
            del module.type


@contextlib.contextmanager
def _no_device() -> Iterator[None]:
    """What asks CUDA itself for something is given nothing."""
    replaced = [(torch.cuda, "Event", lambda **options: _Event())]
    replaced.append((Roles, "_on_device", lambda self: contextlib.nullcontext()))
    replaced.append((torch, "tensor", _set_up))
    specvlm = StaticTree.of(NAMED_TREES["specvlm"])  # worked out on the host, with its numbers
    replaced.append((StaticTree, "of", lambda branches: specvlm))
    before = [vars(owner)[name] for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(replaced, before):
            setattr(owner, name, value)


@contextlib.contextmanager
def _drawn_once() -> Iterator[None]:
    """torch draws a truncated normal again until all of it fits; what has no values never does."""
    theirs = nn.init._no_grad_trunc_normal_
    nn.init._no_grad_trunc_normal_ = lambda tensor, *bounds, **options: tensor
    try:
        yield
    finally:
        nn.init._no_grad_trunc_normal_ = theirs


def run_iteration(
    pair: Pair,
    *,
    context: int,
    launched: Launch,
    before: Launch | None = None,
    seen: Callable[[Any], None] | None = None,
    batch_size: int = 1,
    device_class: str = "sm90",
    drafts: bool = True,
    **fields: Any,
) -> dict[str, dict[str, int]]:
    """One iteration of a pair in bfloat16 behind a prompt, as `e2e.py` measures it.

    Args:
        pair: Its shapes.
        context: Tokens of every prompt.
        launched: Done in place of every launch of a kernel of lvspec's in the iteration.
        before: The same for what is launched to look at the models; None: nothing is done.
        seen: Told of every operation of torch's in the iteration.
        batch_size: Sequences.
        device_class: Whose launch tables count.
        drafts: Whether the draft drafts; False: autoregression.
        **fields: Of `DecodeConfig`; of static trees there is "specvlm".

    Returns:
        What of the models is lvspec's, as `DecodeStats.parts`.

    Raises:
        RuntimeError: torch has no CUDA and there is no C++ compiler.
    """
    accept_cuda()
    # Fakes have no addresses; nothing here is decided by them but whether something has moved.
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
    config = DecodeConfig(**{"max_new_tokens": 1024, "eos_ids": (), "capture": False, **fields})
    before = before or (lambda kernel, grid, arguments: None)
    with _no_device(), _ordinary(), FakeTensorMode(), torch.no_grad():
        with launching(before, device_class), OnDevice(agrees=True):
            engine = _engine(pair, config, context, batch_size, drafts)
            with engine.attention():
                engine.run_phases()  # makes what is made once
        with launching(launched, device_class), engine.attention():
            with OnDevice(seen):
                engine.run_phases()
            return engine.parts


def _plan(cache: SlotCache) -> None:
    """The split plan that a prompt leaves in a cache; which kernels attention launches follows."""
    _, batch_size, kv_heads, capacity, _ = cache.k.shape
    shape = (3, batch_size, most_pieces(capacity, kv_heads))
    cache.plan = ops.SplitPlan(*torch.zeros(shape, dtype=torch.int32, device=cache.k.device))


def _engine(
    pair: Pair, config: DecodeConfig, context: int, batch_size: int, drafts: bool
) -> Engine:
    """An engine with a sequence in every place, as behind a prefill."""
    with _drawn_once():
        target = Model(build(pair.target, CUDA, torch.bfloat16), "target", fuse=config.fuse)
        draft = None
        if drafts:
            draft = Model(build(pair.draft, CUDA, torch.bfloat16), "draft", fuse=config.fuse)
    drafter = make_drafter(target, draft, config)
    policy = AcceptancePolicy.lvspec()
    engine = Engine(target, drafter, policy, config, batch_size=batch_size)
    engine.reserve(context)
    caches = [engine.cache, *([drafter.cache] if isinstance(drafter, CachedDrafter) else [])]
    for cache in caches:
        _plan(cache)
    prompt = torch.zeros(1, context, dtype=torch.int64, device=CUDA)
    for place in range(batch_size):
        request, stats = Request({"input_ids": prompt}), DecodeStats(CUDA, drafter.gamma)
        engine.places[place] = Sequence(request, place, stats, None, Stopping())
    engine._is_timed = False
    return engine
