"""logit_stats: the few numbers of a row of logits on which acceptance depends."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class LogitStats(NamedTuple):
    """What `logit_stats` returns. Floats are float32 (float64 for float64 input)."""

    top_ids: torch.Tensor  # int32 [B, S, K], best first
    top_logits: torch.Tensor  # [B, S, K]
    lse: torch.Tensor  # [B, S], natural logarithm of the softmax denominator
    entropy: torch.Tensor  # [B, S], nats


def logit_stats(logits: torch.Tensor, *, top_k: int = 4) -> LogitStats:
    """Best tokens, log-sum-exp and entropy of every row of logits.

    Tokens are ranked by logit, NaN counting as -inf, ties to the lower id. With m the largest logit
    of the row and `l = sum exp(x - m)`: `lse = m + ln l` and
    `entropy = ln l - sum((x - m) exp(x - m)) / l`, where a logit of -inf adds nothing. A row with a
    NaN or an infinite m has entropy NaN; its lse is NaN with a NaN in the row, else m itself (+inf,
    or -inf if the row is -inf throughout).

    Worked example: `[ln 2, ln 4, -inf, ln 2]` with `top_k=3` has ids `[1, 0, 3]`, lse `ln 8` and,
    the probabilities being 1/4, 1/2, 0 and 1/4, entropy `1.5 ln 2`.

    Args:
        logits: float `[B, S, V]`.
        top_k: K, from 1 to 16 and at most V.

    Returns:
        LogitStats.
    """
    values = logits if logits.dtype == torch.float64 else logits.float()
    top_ids, top_logits = _ranked(values, top_k)

    highest = values.amax(-1, keepdim=True)
    # The lowest finite number in place of -inf: exp gives 0 either way, but 0 * -inf would be NaN.
    below = (values - highest).clamp_(min=torch.finfo(values.dtype).min)
    weights = below.exp()
    total = weights.sum(-1)
    log_total = total.log()
    entropy = log_total - weights.mul_(below).sum(-1) / total
    highest = highest.squeeze(-1)
    finite = highest.isfinite()
    lse = torch.where(finite, highest + log_total, highest)
    return LogitStats(top_ids, top_logits, lse, entropy.masked_fill_(~finite, math.nan))


def _ranked(values: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (int32) and values of the `top_k` best of every row, ranked as above."""
    vocabulary = values.shape[-1]
    values = values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if vocabulary <= _SORTED_VOCABULARY:
        ranked, ids = values.sort(dim=-1, descending=True, stable=True)
        return ids[..., :top_k].int(), ranked[..., :top_k].contiguous()
    # topk finds the right values but, among equal ones, any ids. One more column shows whether
    # equal values were left out; if not, sorting by id first and by value second puts the ids in
    # order.
    ranked, ids = values.topk(top_k + 1, dim=-1)
    cut = ranked[..., top_k - 1] == ranked[..., top_k]
    ids, order = ids[..., :top_k].sort(dim=-1)
    ranked, order = ranked.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    if cut.any():
        for index in cut.nonzero().tolist():
            row = tuple(index)
            lowest = ranked[row][-1]
            better = int((ranked[row] > lowest).sum())
            equal = (values[row] == lowest).nonzero().flatten()
            ids[row][better:] = equal[: top_k - better]
    return ids.int(), ranked


_SORTED_VOCABULARY = 256
"""Up to this size a stable sort of the whole row is as quick as `topk` with its repairs."""
