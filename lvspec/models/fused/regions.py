"""Regions for torch.compile: the forwards of norms, gated MLPs and rotary embeddings.

Compiled once a class and shape: weights are inputs of the compiled code, so layers share it.
Prompts, which are of any length, are not read by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch import nn

from lvspec.models.fused.patches import Patch, fused, is_patched
from lvspec.models.fused.recognise import Patches, is_gated_mlp, is_rms_norm, is_rotary
from lvspec.warmup import warming_up

MAX_SHAPES = 64
"""Shapes that a class is compiled for: of target and draft, of trees' levels. torch allows 8."""


@cache
def _compiled(code: Callable) -> Callable:
    return torch.compile(code, dynamic=False)


def compiled_regions(modules: Iterable[nn.Module]) -> Patches:
    """The compiled forwards of these modules; nothing is compiled before they are called."""
    return Patches(
        (module, _compiled(type(module).forward))
        for module in modules
        if not is_patched(module)
        and (is_rms_norm(module) or is_gated_mlp(module) or is_rotary(module))
    )


@contextmanager
def compiled(patches: Iterable[Patch]) -> Iterator[None]:
    """Within this context the regions are the compiled ones."""
    limit = torch._dynamo.config.patch(recompile_limit=MAX_SHAPES)
    with limit, fused(patches), _compiling_is_warm_up():
        yield


@contextmanager
def _compiling_is_warm_up() -> Iterator[None]:
    handler = torch._dynamo.callback.callback_handler
    with ExitStack() as under_way:
        start = handler.register_start_callback(lambda _: under_way.enter_context(warming_up()))
        end = handler.register_end_callback(lambda _: under_way.close())
        try:
            yield
        finally:
            handler.remove_start_callback(start)
            handler.remove_end_callback(end)
