"""Phase 1, draft: who proposes the tokens that the target verifies."""

from lvspec.draft.base import Draft, Drafter, DraftShape, NoDrafter
from lvspec.draft.chain import ModelDrafter
from lvspec.draft.factory import DraftChoice, draft_model, make_drafter
from lvspec.draft.model_cache import CachedDrafter
from lvspec.draft.ngram import NGramDrafter
from lvspec.draft.self_draft import SelfDrafter

__all__ = [
    "CachedDrafter",
    "Draft",
    "DraftChoice",
    "DraftShape",
    "Drafter",
    "ModelDrafter",
    "NGramDrafter",
    "NoDrafter",
    "SelfDrafter",
    "draft_model",
    "make_drafter",
]
