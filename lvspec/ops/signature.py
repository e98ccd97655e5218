"""An operation's arguments: those of its specification, flat, as every backend takes them.

The signature of the specification is the only definition of them. A backend implements the schema
that is made of it, with tensors and numbers in this order: a NamedTuple stands for its fields.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvspec.reference import SplitPlan

_TYPES = {Tensor: "Tensor", float: "float", int: "int", bool: "bool", torch.dtype: "ScalarType"}
_ALIASES = "abcdefghijklmnop"


class _Argument(NamedTuple):
    name: str
    group: type | None  # the NamedTuple that it is
    flat: dict[str, str]  # what stands for it in the schema: type by name


class Signature:
    """What follows from the signature of a specification.

    Its arguments are tensors, numbers, dtypes and NamedTuples of them. None may stand for a tensor
    or a NamedTuple; an argument that is a number or None is a number in the schema, and who calls
    the operation says which.
    """

    def __init__(self, specification: Callable[..., Any]) -> None:
        self._specification = specification
        hints = typing.get_type_hints(specification)
        self._result = hints["return"]
        names = inspect.signature(specification).parameters
        self._arguments = [_argument(name, hints[name]) for name in names]
        self._flat = {name: type_ for x in self._arguments for name, type_ in x.flat.items()}

    def schema(self, written: tuple[str, ...], scratch: bool) -> str:
        """As `torch.library` wants it.

        Args:
            written: The tensors that are changed in place.
            scratch: Whether `workspace`, a tensor or None, is the last argument.
        """
        types = dict(self._flat)
        for alias, name in zip(_ALIASES, written):
            types[name] = f"Tensor({alias}!)"
        if scratch:
            types["workspace"] = "Tensor(w!)?"
        taken = ", ".join(f"{type_} {name}" for name, type_ in types.items())
        return f"({taken}) -> {_returned(self._result)}"

    def call(self, *flat: Any) -> Any:
        """The specification's result for the operation's arguments, without a workspace."""
        values, given = iter(flat), {}
        for name, group, fields in self._arguments:
            parts = [next(values) for _ in fields]
            if group is None:
                given[name] = parts[0]
            else:
                given[name] = None if parts[0] is None else group(*parts)
        result = self._specification(**given)
        return tuple(result) if isinstance(result, tuple) else result

    def select(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, handed those of the operation's arguments that it names."""
        names = list(self._flat)
        chosen = [names.index(name) for name in inspect.signature(function).parameters]

        def call(*flat: Any) -> Any:
            return function(*(flat[index] for index in chosen))

        return call


def _argument(name: str, hint: Any) -> _Argument:
    kinds = typing.get_args(hint) or (hint,)
    (kind,) = (kind for kind in kinds if kind is not NoneType)
    mark = "?" if NoneType in kinds else ""
    if kind is Tensor:
        return _Argument(name, None, {name: "Tensor" + mark})
    if kind in _TYPES:
        return _Argument(name, None, {name: _TYPES[kind]})
    # `start` alone says nothing; the fields of statistics and rules are known by their own names.
    prefix = f"{name}_" if kind is SplitPlan else ""
    fields = typing.get_type_hints(kind).items()
    return _Argument(name, kind, {prefix + field: _TYPES[type_] + mark for field, type_ in fields})


def _returned(result: Any) -> str:
    if result is NoneType:
        return "()"
    if result is Tensor:
        return "Tensor"
    if typing.get_origin(result) is tuple:
        return "(" + ", ".join("Tensor" for _ in typing.get_args(result)) + ")"
    return "(" + ", ".join(f"Tensor {field}" for field in result._fields) + ")"
