"""What the processes that share a target go on with: the first one's word.

Each computes a whole iteration, and rounding is no promise: a draft that runs on two GPUs, say, may
choose another token on one of them. So what was drafted is the first rank's before it is verified,
and what was accepted is before it is committed: two messages an iteration, of some hundred bytes.
"""

from __future__ import annotations

from dataclasses import replace

from lvspec.models.ranks import Ranks
from lvspec.ops import Acceptance
from lvspec.phases.accept import Judgement
from lvspec.phases.slots import Draft


def first_draft(draft: Draft, ranks: Ranks) -> Draft:
    """What the first rank drafted. Its `logits` are of this rank: the first alone accepts by them.

    All drafts of an iteration have one number of slots.
    """
    if ranks.size == 1:
        return draft
    shape = draft.shape
    given = {"tokens": draft.tokens, "num_slots": shape.num_slots}
    if not shape.is_chain:  # those of a chain are the same whatever was drafted
        given |= {name: getattr(shape, name) for name in ("parents", "ancestors", "depths")}
    if draft.num_found is not None:
        given["num_found"] = draft.num_found
    found = dict(zip(given, ranks.first(*given.values()), strict=True))
    of_draft = {name: found.pop(name) for name in ("tokens", "num_found") if name in found}
    return replace(draft, shape=replace(shape, **found), **of_draft)


def first_judgement(judgement: Judgement, ranks: Ranks) -> Judgement:
    """What the first rank accepted, and in which rows it found a NaN."""
    if ranks.size == 1:
        return judgement
    *acceptance, lse = ranks.first(*judgement.acceptance, judgement.stats.lse)
    stats = judgement.stats._replace(lse=lse)
    return judgement._replace(acceptance=Acceptance(*acceptance), stats=stats)
