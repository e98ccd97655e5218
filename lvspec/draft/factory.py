"""Which drafter a run has."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

from lvspec.config import DecodeConfig
from lvspec.draft.base import Drafter, NoDrafter
from lvspec.draft.chain import ModelDrafter
from lvspec.draft.ngram import NGramDrafter
from lvspec.draft.pruning import VideoPruning
from lvspec.draft.self_draft import SelfDrafter
from lvspec.models import Model, check_pair

DraftChoice = PreTrainedModel | Literal["self", "ngram"] | None
"""Who may draft: a model, the target itself, a look-up in prompt and output, or nobody."""

_EXPECTED = 'draft: expected a transformers model, None, "self" or "ngram", got '


def draft_model(draft: DraftChoice, *, capture: bool) -> Model | None:
    """The model that drafts beside the target, if there is one.

    Raises:
        TypeError: `draft` is none of what may draft.
        ValueError: It is another word, or a model that is not supported.
    """
    if draft is None or (isinstance(draft, str) and draft in ("self", "ngram")):
        return None
    if isinstance(draft, str):
        raise ValueError(f"{_EXPECTED}{draft!r}")
    if not isinstance(draft, PreTrainedModel):
        raise TypeError(f"{_EXPECTED}{type(draft).__name__}")
    return Model(draft, "draft", capture=capture)


def make_drafter(
    target: Model, draft: Model | Literal["self", "ngram"] | None, config: DecodeConfig
) -> Drafter:
    """The drafter that `config` describes.

    Raises:
        ValueError: The draft cannot stand beside the target, or is no word that is known.
    """
    if draft is None:
        return NoDrafter(target.device)
    if draft == "ngram":
        return NGramDrafter(
            gamma=config.gamma,
            ngram_max=config.ngram_max,
            never=target.visual_ids,
            device=target.device,
        )
    pruning = None
    if config.draft_keep < 1:
        pruning = VideoPruning(target, config.draft_keep, config.draft_keep_by)
    chain = {"gamma": config.gamma, "target_vocab": target.vocab_size, "pruning": pruning}
    if draft == "self":
        return SelfDrafter(target, **chain)
    if not isinstance(draft, Model):
        raise ValueError(f"{_EXPECTED}{draft!r}")
    check_pair(target, draft)
    return ModelDrafter(draft, **chain)
