"""Phase 4, commit: what was accepted becomes output, and lengths move on."""

from __future__ import annotations

import torch
from torch import Tensor

from lvspec import ops
from lvspec.models.cache import SlotCache
from lvspec.phases.slots import Draft
from lvspec.phases.state import DecodeState
from lvspec.reference.append import HEAD, NO_NAN
from lvspec.reference.kinds import BONUS


def commit(
    state: DecodeState,
    cache: SlotCache,
    draft: Draft,
    acceptance: ops.Acceptance,
    relevance: Tensor | None,
    lse: Tensor,
    *,
    regrets: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """Append the accepted tokens and the bonus token, and move the target's `kv_len` on.

    After an end-of-sequence token nothing is kept, nor beyond `max_new_tokens`.

    Args:
        state: Changed in place.
        cache: The target's; `kv_len` is changed in place, and rows of a tree that were accepted
            move to where the sequence goes on (those of a chain stand there).
        draft: What was verified.
        acceptance: From phase 3.
        relevance: float32 `[B, S]`, or None.
        lse: float32 `[B, S]`, of the target's rows; NaN where a logit is.
        regrets: `[B, S]` along the path, of each of its tokens; None: the report has none.
        thresholds: float32 `[B]`, relevance from which on a row is an anchor, with `regrets` and
            `relevance` alone; None: the report says nothing of anchors.

    Returns:
        What the host wants to know, int64 `[B, HEAD + parts * S]`: the fields of `Report`,
        regrets as the bits of float64 numbers. There are one to three parts: tokens, regrets,
        anchors; behind anchors there is one column more, the threshold.
    """
    if not draft.shape.is_chain:
        ops.commit_kv(cache.k, cache.v, cache.kv_len, acceptance.path, acceptance.num_accepted)
    drafted = (draft.tokens, draft.shape.num_slots)
    given = (*state.tensors(), cache.kv_len, *drafted, *acceptance, lse, relevance)
    report = ops.append(*given, HEAD, BONUS, NO_NAN)
    if regrets is None:
        return report
    # A path begins with the root, which is no output.
    parts = [report, regrets.roll(-1, dims=1).double().view(torch.int64)]
    if thresholds is not None:
        row = acceptance.path.clamp(min=0).long()
        # As the rule has it: a NaN is an anchor.
        parts.append((~(relevance.gather(1, row) < thresholds[:, None])).long())
        parts.append(thresholds.double().view(torch.int64)[:, None])
    return torch.cat(parts, dim=1)

