"""Phase 1, draft: who proposes the tokens that the target verifies."""

from lvspec.draft.base import Draft, Drafter, DraftShape, NoDrafter
from lvspec.draft.chain import ModelDrafter
from lvspec.draft.factory import make_drafter

__all__ = ["Draft", "DraftShape", "Drafter", "ModelDrafter", "NoDrafter", "make_drafter"]
