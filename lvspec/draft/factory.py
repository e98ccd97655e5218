"""Which drafter a run has."""

from __future__ import annotations

from lvspec.config import DecodeConfig
from lvspec.draft.anchor_tree import AnchorTreeDrafter
from lvspec.draft.base import Drafter, NoDrafter
from lvspec.draft.chain import ModelDrafter
from lvspec.draft.stopping import StoppingDrafter
from lvspec.draft.tree import DynamicTreeDrafter, StaticTreeDrafter
from lvspec.models import Model, check_pair
from lvspec.trees import NAMED_TREES, AnchorTree, DynamicTree, StaticTree


def make_drafter(target: Model, draft: Model | None, config: DecodeConfig) -> Drafter:
    """The drafter that `config` describes.

    Raises:
        ValueError: The draft cannot stand beside the target.
    """
    if draft is None:
        return NoDrafter(target.device)
    check_pair(target, draft)
    if config.tree is not None:
        return _make_tree_drafter(draft, target.vocab_size, config)
    if config.adaptive or config.stop_at_unsure_anchors is not None:
        return StoppingDrafter(
            draft,
            gamma=config.gamma,
            target_vocab=target.vocab_size,
            cost_ratio=_cost_ratio(target, draft, config) if config.adaptive else None,
            confidence=config.stop_at_unsure_anchors,
            anchor_threshold=config.draft_anchor_threshold,
        )
    return ModelDrafter(draft, gamma=config.gamma, target_vocab=target.vocab_size)


def _make_tree_drafter(draft: Model, target_vocab: int, config: DecodeConfig) -> Drafter:
    tree = config.tree
    if isinstance(tree, DynamicTree):
        return DynamicTreeDrafter(draft, tree, target_vocab=target_vocab)
    if isinstance(tree, AnchorTree):
        return AnchorTreeDrafter(
            draft,
            tree,
            gamma=config.gamma,
            target_vocab=target_vocab,
            anchor_threshold=config.draft_anchor_threshold,
        )
    branches = NAMED_TREES[tree] if isinstance(tree, str) else tree
    return StaticTreeDrafter(draft, StaticTree.of(branches), target_vocab=target_vocab)


def _cost_ratio(target: Model, draft: Model, config: DecodeConfig) -> float:
    if config.cost_ratio is not None:
        return config.cost_ratio
    return draft.step_bytes / target.step_bytes
