"""Phase 1, draft: who proposes the tokens that the target verifies."""

from lvspec.draft.anchor_tree import AnchorTreeDrafter
from lvspec.draft.base import Draft, Drafter, DraftShape, NoDrafter
from lvspec.draft.chain import ModelDrafter
from lvspec.draft.factory import DraftChoice, draft_model, make_drafter
from lvspec.draft.model_cache import CachedDrafter, PromptReading
from lvspec.draft.ngram import NGramDrafter
from lvspec.draft.ngram_chain import NGramChainDrafter
from lvspec.draft.stopping import StoppingDrafter
from lvspec.draft.tree import DynamicTreeDrafter, StaticTreeDrafter

__all__ = [
    "AnchorTreeDrafter",
    "CachedDrafter",
    "Draft",
    "DraftChoice",
    "DraftShape",
    "Drafter",
    "DynamicTreeDrafter",
    "ModelDrafter",
    "NGramChainDrafter",
    "NGramDrafter",
    "NoDrafter",
    "PromptReading",
    "StaticTreeDrafter",
    "StoppingDrafter",
    "draft_model",
    "make_drafter",
]
