"""Which drafter a run has."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

from lvspec.config import DecodeConfig
from lvspec.models.head import draft_head
from lvspec.models.inputs import check_pair
from lvspec.models.model import Model
from lvspec.phases.draft.anchor_stop import AnchorStopDrafter
from lvspec.phases.draft.anchor_tree import AnchorTreeDrafter
from lvspec.phases.draft.base import Drafter, NoDrafter
from lvspec.phases.draft.chain import ModelDrafter
from lvspec.phases.draft.model_cache import DraftSource, PromptReading
from lvspec.phases.draft.ngram import NGramDrafter
from lvspec.phases.draft.ngram_chain import NGramChainDrafter
from lvspec.phases.draft.pruning import VideoPruning
from lvspec.phases.draft.skip_tree import SkipTreeDrafter
from lvspec.phases.draft.tree import DynamicTreeDrafter, StaticTreeDrafter
from lvspec.tree_shapes import NAMED_TREES, AnchorTree, DynamicTree, SkipTree, StaticTree, Tree

DraftChoice = PreTrainedModel | Literal["self", "ngram"] | None
"""Who may draft: a model, the target itself, a look-up in prompt and output, or nobody."""

_EXPECTED = 'draft: expected a transformers model, None, "self" or "ngram", got '


def draft_model(draft: DraftChoice, config: DecodeConfig) -> Model | None:
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
    return Model(draft, "draft", fuse=config.fuse)


def make_drafter(
    target: Model,
    draft: Model | Literal["self", "ngram"] | None,
    config: DecodeConfig,
    eos_ids: tuple[int, ...] = (),
) -> Drafter:
    """The drafter that `config` describes.

    Args:
        eos_ids: End-of-sequence ids of the policy; a `draft_vocab` gets them, or those of `config`
            or the target.

    Raises:
        ValueError: The draft cannot stand beside the target or propose what it is to propose, or
            is no word that is known.
    """
    gamma = config.fixed_gamma
    if draft is None:
        return NoDrafter(target.device)
    if draft == "ngram":
        return NGramDrafter(
            gamma=gamma,
            ngram_max=config.ngram_max,
            never=target.visual_ids,
            device=target.device,
        )
    source = draft_source(target, draft, config, eos_ids)
    if config.tree is not None:
        return _make_tree_drafter(source, config)
    if config.stop_at_unsure_anchors is not None:
        return AnchorStopDrafter(
            source,
            gamma=gamma,
            confidence=config.stop_at_unsure_anchors,
            anchor_threshold=config.draft_anchor_threshold,
        )
    if config.draft_ngram:
        return NGramChainDrafter(
            source,
            gamma=gamma,
            lookup=config.draft_ngram,
            passes=config.draft_passes or gamma,
            ngram_max=config.ngram_max,
            never=target.visual_ids,
        )
    return ModelDrafter(source, gamma=gamma)


def draft_source(
    target: Model,
    draft: Model | Literal["self"],
    config: DecodeConfig,
    eos_ids: tuple[int, ...] = (),
) -> DraftSource:
    """The model that drafts, and what of it is used.

    Args:
        eos_ids: As for `make_drafter`.

    Raises:
        ValueError: As `make_drafter`.
    """
    is_target = draft == "self"
    if is_target:
        draft = target
    elif isinstance(draft, Model):
        check_pair(target, draft)
    else:
        raise ValueError(f"{_EXPECTED}{draft!r}")
    pruning = None
    if config.draft_keep < 1:
        pruning = VideoPruning(target, config.draft_keep, config.draft_keep_by)
    return DraftSource(
        draft,
        target.vocab_size,
        _draft_vocab(target, draft, config, eos_ids),
        PromptReading(pruning, is_target=is_target),
    )


def _make_tree_drafter(source: DraftSource, config: DecodeConfig) -> Drafter:
    tree = config.tree
    if isinstance(tree, DynamicTree):
        return DynamicTreeDrafter(source, tree)
    if isinstance(tree, AnchorTree):
        return AnchorTreeDrafter(
            source, tree, gamma=config.fixed_gamma, anchor_threshold=config.draft_anchor_threshold
        )
    if isinstance(tree, SkipTree):
        return SkipTreeDrafter(source, tree, gamma=config.fixed_gamma)
    branches = NAMED_TREES[tree] if isinstance(tree, str) else tree
    return StaticTreeDrafter(source, StaticTree.of(branches))


def _draft_vocab(
    target: Model, draft: Model, config: DecodeConfig, eos_ids: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The ids of `config`, ascending, with those that end a sequence.

    Raises:
        ValueError: An id is in only one of the vocabularies, or a tree needs more of them.
    """
    ids = config.draft_vocab
    if ids is None:
        return None
    for model in (target, draft):
        if ids[-1] >= model.vocab_size:
            raise ValueError(
                f"draft_vocab: expected token ids below {model.vocab_size}, the {model.role}'s "
                f"vocabulary, got {ids[-1]}"
            )
    ends = eos_ids or target.eos_ids if config.eos_ids is None else config.eos_ids
    shared = min(target.vocab_size, draft.vocab_size)
    ids = tuple(sorted({*ids, *(end for end in ends if 0 <= end < shared)}))
    needed = _choices(config.tree)
    if len(ids) < needed:
        raise ValueError(
            f"draft_vocab: expected at least {needed} token ids for tree={config.tree!r}, got "
            f"{len(ids)}"
        )
    return ids


def _choices(tree: Tree | None) -> int:
    """Tokens that may stand behind one node of a tree."""
    if tree is None or isinstance(tree, SkipTree):
        return 1
    if isinstance(tree, DynamicTree):
        return tree.children
    if isinstance(tree, AnchorTree):
        return 1 + tree.siblings
    branches = NAMED_TREES[tree] if isinstance(tree, str) else tree
    return 1 + max(max(branch) for branch in branches)


def cost_ratio_of_bytes(target: Model, source: DraftSource) -> float:
    """Bytes of the weights that a step of the draft reads, over those that a target pass reads."""
    head = draft_head(source.model.hf.lm_head, source.shared_vocab, source.draft_vocab)
    return source.model.step_bytes_with(head) / target.step_bytes
