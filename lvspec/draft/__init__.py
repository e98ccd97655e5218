"""Phase 1, draft: who proposes the tokens that the target verifies."""

from lvspec.draft.anchor_tree import AnchorTreeDrafter
from lvspec.draft.base import Draft, Drafter, DraftShape, NoDrafter
from lvspec.draft.chain import ModelDrafter
from lvspec.draft.factory import make_drafter
from lvspec.draft.stopping import StoppingDrafter
from lvspec.draft.tree import DynamicTreeDrafter, StaticTreeDrafter

__all__ = [
    "AnchorTreeDrafter",
    "Draft",
    "DraftShape",
    "Drafter",
    "DynamicTreeDrafter",
    "ModelDrafter",
    "NoDrafter",
    "StaticTreeDrafter",
    "StoppingDrafter",
    "make_drafter",
]
