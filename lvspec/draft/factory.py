"""Which drafter a run has."""

from __future__ import annotations

from lvspec.config import DecodeConfig
from lvspec.draft.base import Drafter, NoDrafter
from lvspec.draft.chain import ModelDrafter
from lvspec.models import Model, check_pair


def make_drafter(target: Model, draft: Model | None, config: DecodeConfig) -> Drafter:
    """The drafter that `config` describes.

    Raises:
        ValueError: The draft cannot stand beside the target.
    """
    if draft is None:
        return NoDrafter(target.device)
    check_pair(target, draft)
    return ModelDrafter(draft, gamma=config.gamma, target_vocab=target.vocab_size)
