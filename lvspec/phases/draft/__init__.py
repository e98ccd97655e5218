"""Phase 1, draft: who proposes the tokens that the target verifies."""

from lvspec.phases.draft.anchor_stop import AnchorStopDrafter
from lvspec.phases.draft.anchor_tree import AnchorTreeDrafter
from lvspec.phases.draft.base import Drafter, NoDrafter
from lvspec.phases.draft.chain import ModelDrafter
from lvspec.phases.draft.factory import DraftChoice, draft_model, make_drafter
from lvspec.phases.draft.model_cache import CachedDrafter, DraftSource, PromptReading
from lvspec.phases.draft.ngram import NGramDrafter
from lvspec.phases.draft.ngram_chain import NGramChainDrafter
from lvspec.phases.draft.skip_tree import SkipTreeDrafter
from lvspec.phases.draft.tree import DynamicTreeDrafter, StaticTreeDrafter
from lvspec.phases.slots import Draft, DraftShape

__all__ = [
    "AnchorStopDrafter",
    "AnchorTreeDrafter",
    "CachedDrafter",
    "Draft",
    "DraftChoice",
    "DraftShape",
    "DraftSource",
    "Drafter",
    "DynamicTreeDrafter",
    "ModelDrafter",
    "NGramChainDrafter",
    "NGramDrafter",
    "NoDrafter",
    "PromptReading",
    "SkipTreeDrafter",
    "StaticTreeDrafter",
    "draft_model",
    "make_drafter",
]
