"""Phase 1, draft: who proposes the tokens that the target verifies."""

from lvspec.phases.draft.adaptive import StoppingDrafter
from lvspec.phases.draft.anchor_tree import AnchorTreeDrafter
from lvspec.phases.draft.base import Draft, Drafter, DraftShape, NoDrafter
from lvspec.phases.draft.chain import ModelDrafter
from lvspec.phases.draft.factory import DraftChoice, draft_model, make_drafter
from lvspec.phases.draft.model_cache import CachedDrafter, PromptReading
from lvspec.phases.draft.ngram import NGramDrafter
from lvspec.phases.draft.ngram_chain import NGramChainDrafter
from lvspec.phases.draft.tree import DynamicTreeDrafter, StaticTreeDrafter

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
