"""Patches: another `forward` for a module in hand, for the time being."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType

from torch import nn

Patch = tuple[nn.Module, Callable]
"""A module, and what is its `forward` for the time being."""


def is_patched(module: nn.Module) -> bool:
    """Whether the module has a `forward` of its own, by whomever."""
    return "forward" in vars(module)


def has_forward(module: nn.Module, forward: Callable) -> bool:
    """Whether calling the module is calling this function: it is patched in, and nothing hooks."""
    found = vars(module).get("forward")
    is_hooked = module._forward_hooks or module._forward_pre_hooks
    return getattr(found, "__func__", None) is forward and not is_hooked


@contextmanager
def fused(patches: Iterable[Patch]) -> Iterator[None]:
    """Within this context the modules have these forwards; patches of others are left alone.

    Entered in every prefill and once a loop: a dictionary entry a module.
    """
    patched: list[tuple[nn.Module, MethodType]] = []
    try:
        for module, forward in patches:
            if not is_patched(module):
                patched.append((module, MethodType(forward, module)))
                vars(module)["forward"] = patched[-1][1]
        yield
    finally:
        for module, forward in patched:
            if vars(module).get("forward") is forward:
                del vars(module)["forward"]
