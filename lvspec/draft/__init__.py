"""Phase 1, draft: who proposes the tokens that the target verifies."""

from lvspec.draft.base import Draft, Drafter, DraftShape, NoDrafter
from lvspec.draft.chain import ModelDrafter

__all__ = ["Draft", "DraftShape", "Drafter", "ModelDrafter", "NoDrafter"]
