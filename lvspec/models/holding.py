"""Several models held at once, for as long as they decode together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from lvspec.models.model import Model


@contextmanager
def held(models: Iterable[Model]) -> Iterator[None]:
    """`Model.held` of several models, for decoding with them.

    Raises:
        ValueError: torch.autocast is on: HF's forward would compute in other types than the caches
            have, and lvspec's pass would not.
    """
    with ExitStack() as stack:
        # Always in the same order, or two threads could wait for each other.
        for model in sorted(models, key=lambda model: model.watch.number):
            device_type = model.device.type
            if torch.is_autocast_enabled(device_type):
                raise ValueError(
                    f"torch.autocast: expected it to be off for {device_type} while lvspec "
                    "decodes, got on; convert the models (model.to(torch.bfloat16)), or decode "
                    f'within torch.autocast("{device_type}", enabled=False)'
                )
            stack.enter_context(model.held())
        yield
