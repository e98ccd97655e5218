"""What passes of a model depend on besides their inputs, so that a change of it is seen.

A plan and a CUDA graph were right for the modules as they were. Whatever Python looks at in a pass
can make them wrong: classes and their code, plain attributes, configs, hooks, addresses of weights.
All of that is compared before modules are used again. What cannot be compared (a replaced
`forward`, a class or an object of somebody else's) is named, and HF's forward runs such a model.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers import PretrainedConfig

# What is only printed decides nothing; torchao puts one on every layer that it has quantised.
_OF_MODULE = frozenset(vars(nn.Module())) - {"training"} | {"extra_repr"}
_LIVE = (Tensor, PretrainedConfig)
_ORDINARY = frozenset({Tensor, nn.Parameter, nn.Buffer})
_KNOWN_ROOTS = frozenset({"torch", "transformers", "torchao", "peft", "lvspec"})
"""Packages whose modules keep what their passes depend on in attributes, and change nothing there
from pass to pass."""

_VALUES = (
    *(type(None), bool, int, float, complex, str, bytes, type, Enum),
    *(torch.dtype, torch.device, torch.Size, torch.layout, types.BuiltinFunctionType),
)
_CODE = (types.FunctionType, property, staticmethod, classmethod)
_ENTRIES = attrgetter("forward", "__call__", "_call_impl")


class Fingerprint:
    """Modules as they are now. Costs some microseconds a module, and waits for no device.

    Args:
        modules: All of them, not only the outermost; none has a `forward` of lvspec's now.

    Attributes:
        unknown: What in them cannot be compared, in words; None: everything can.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.unknown = _unknown(modules)
        self._modules = [_Module(module) for module in modules]
        self._configs = [(config, _frozen(_fields(config))) for config in _configs(modules)]
        self._code = list(_code({type(module) for module in modules}))
        self._surroundings = _surroundings()

    def has_places_of(self, other: Fingerprint) -> bool:
        """Whether the tensors of the other are the same ones."""
        mine, theirs = ([module.addresses for module in each._modules] for each in (self, other))
        return mine == theirs

    def holds(self, modules: list[nn.Module]) -> bool:
        """Whether a pass of these modules is still the one that it was."""
        try:
            return (
                len(modules) == len(self._modules)
                and self._surroundings == _surroundings()
                and all(then.holds(module) for then, module in zip(self._modules, modules))
                and all(_fields(config) == then for config, then in self._configs)
                and all(read(of) == then for read, of, then in self._code)
            )
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError):
            return False  # something is gone, or is another tensor in the place of a number


def modules_of(*roots: nn.Module) -> list[nn.Module]:
    """All modules in these, each once."""
    found: dict[int, nn.Module] = {}
    waiting = list(reversed(roots))
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            waiting += module._modules.values()
    return list(found.values())


class _Module:
    """One module: its class, its plain attributes, and where its tensors are (`addresses`)."""

    def __init__(self, module: nn.Module) -> None:
        own = {name: value for name, value in vars(module).items() if name not in _OF_MODULE}
        plain = [name for name, value in own.items() if not isinstance(value, _LIVE)]
        self._id, self._kind, self._count = id(module), type(module), len(vars(module))
        self._read = itemgetter(*plain)  # "training" at least
        self._plain = _frozen(self._read(own))
        self._live = [name for name in own if name not in plain]
        self.addresses = self._find(module)

    def holds(self, module: nn.Module) -> bool:
        own = vars(module)
        return (
            self._id == id(module)
            and self._kind is type(module)
            and self._count == len(own)
            and self._plain == self._read(own)
            and self.addresses == self._find(module)
            and not (module._forward_hooks or module._forward_pre_hooks)
        )

    def _find(self, module: nn.Module) -> list[tuple]:
        addresses = [_address(weight) for weight in module._parameters.values()]
        # What is made of these is small enough to have become a constant somewhere.
        addresses += [(*_address(x), _version(x)) for x in module._buffers.values()]
        for name in self._live:
            x = vars(module)[name]
            addresses.append((*_address(x), _version(x)) if isinstance(x, Tensor) else (id(x),))
        return addresses


def _address(x: Tensor | None) -> tuple:
    if x is None:
        return ()
    if type(x) in _ORDINARY:
        return x.data_ptr(), x.dtype, x.shape, x.stride()
    if not hasattr(x, "__tensor_flatten__"):
        return (id(x),)
    names, _ = x.__tensor_flatten__()  # quantised: several tensors
    return (id(x), *(_address(getattr(x, name)) for name in names))


def _version(x: Tensor | None) -> int:
    return 0 if x is None or x.is_inference() else x._version


def _configs(modules: Iterable[nn.Module]) -> list[PretrainedConfig]:
    """Those of the modules, and those in them."""
    found: dict[int, PretrainedConfig] = {}
    waiting = [value for module in modules for value in vars(module).values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, PretrainedConfig) and id(value) not in found:
            found[id(value)] = value
            waiting += vars(value).values()
    return list(found.values())


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    """All but which attention it is set to: passes here have their own."""
    return {name: value for name, value in vars(config).items() if not name.startswith("_attn")}


def _frozen(value: Any) -> Any:
    """Equal to it as long as no container in it is changed."""
    if isinstance(value, dict):
        return {name: _frozen(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_frozen(part) for part in value]
    if isinstance(value, tuple):
        return tuple(map(_frozen, value))
    return set(value) if isinstance(value, set) else value


_Read = Callable[[Any], Any]


def _code(classes: set[type]) -> Iterator[tuple[_Read, Any, Any]]:
    """(how to read, of what, what was read): methods of classes, functions that these may call."""
    of_classes = {base for kind in classes for base in kind.__mro__ if base is not object}
    for kind in classes:
        yield _ENTRIES, kind, _ENTRIES(kind)
    for base in of_classes:
        yield from _items(vars(base), lambda value: isinstance(value, _CODE))
    spaces = {base.__module__ for base in of_classes if issubclass(base, nn.Module)}
    for name in {*spaces, "torch.nn.functional"}:
        if name in sys.modules:
            yield from _items(vars(sys.modules[name]), callable)


def _items(space: Any, is_wanted: Callable[[Any], bool]) -> Iterator[tuple[_Read, Any, Any]]:
    names = [name for name, value in space.items() if is_wanted(value)]
    if names:
        read = itemgetter(*names)
        yield read, space, read(space)


def _surroundings() -> tuple:
    return (
        bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _unknown(modules: list[nn.Module]) -> str | None:
    if _surroundings()[0]:
        return "there are hooks for all modules (torch.nn.modules.module)"
    for module in modules:
        reason = _unknown_of(module)
        if reason is not None:
            return reason
    for kind in {type(module) for module in modules}:
        if not (_is_known_kind(kind) and _is_known(kind.forward)):
            return f"the code of {kind.__name__} is of {_origin(kind)}"
    return None


def _unknown_of(module: nn.Module) -> str | None:
    name = type(module).__name__
    if _is_hooked(module):
        return f"{name} has hooks"
    if module.training and _dropout(module) > 0:
        return f"{name} drops out: the model is in training mode"
    for attribute, value in vars(module).items():
        if attribute in ("forward", "_compiled_call_impl") and value is not None:
            return f"{name} has another forward than its class"
        if attribute not in _OF_MODULE and not isinstance(value, _LIVE) and not _is_known(value):
            return f"{name}.{attribute} is of {_origin(value)}"
    return None


def _dropout(module: nn.Module) -> float:
    """Of a dropout layer, or of attention."""
    name = "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "attention_dropout"
    share = getattr(module, name, 0.0)
    return share if isinstance(share, (int, float)) else 0.0


def _is_known(value: Any) -> bool:
    """Whether it is the same as long as it is equal to itself."""
    if isinstance(value, _VALUES):
        return True
    if isinstance(value, dict):
        return all(map(_is_known, value.keys())) and all(map(_is_known, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_known, value))
    if isinstance(value, types.FunctionType):
        return _root(value.__globals__.get("__name__", "")) in _KNOWN_ROOTS
    if isinstance(value, types.MethodType):
        return _is_known(value.__func__) and _is_known(value.__self__)
    if isinstance(value, functools.partial):
        return _is_known(value.func) and _is_known((value.args, value.keywords))
    return _is_known_kind(type(value)) and not isinstance(value, (Tensor, nn.Module))


def _is_known_kind(kind: type) -> bool:
    return _root(kind.__module__) in _KNOWN_ROOTS


def _root(name: str) -> str:
    return name.partition(".")[0]


def _origin(value: Any) -> str:
    """Where the code of a class, a function or an object is from."""
    found = value if isinstance(value, (type, types.FunctionType)) else type(value)
    return f"{found.__module__}.{found.__qualname__}"
