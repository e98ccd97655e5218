"""accept: which draft tokens stand, given the target's rows and a policy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lvspec.policy import AcceptancePolicy
from lvspec.reference.kinds import EXACT, LOOSE, NO_KIND, SHIFT
from lvspec.reference.logit_stats import LogitStats
from lvspec.rule import Rule


class Acceptance(NamedTuple):
    """What `accept` returns."""

    path: torch.Tensor  # int32 [B, S], accepted slots from the root on, then -1; path[:, 0] = 0
    num_accepted: torch.Tensor  # int32 [B], without the root and without the bonus token
    bonus_id: torch.Tensor  # int64 [B]
    kind: torch.Tensor  # uint8 [B, S], aligned with path: 0 exact, 1 loose, 2 shift, then 255
    regret: torch.Tensor  # float32 (float64 for float64 stats) [B], nats spent in this call


def accept(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_slots: torch.Tensor,
    stats: LogitStats,
    relevance: torch.Tensor | None,
    policy: AcceptancePolicy,
    *,
    regret_used: torch.Tensor | None = None,
) -> Acceptance:
    """Of all paths through the draft tree that the policy lets stand, the best.

    Everything below is per sequence. `n = num_slots` brought into 1..S. The children of slot p are
    the slots t with `p < t < n` and `parents[t] == p`; slots from n on do not exist. For a node t
    with parent p, all in the statistics' float type and with the policy's numbers rounded to
    float32:

    - `wanted(t) = top_ids[p, 0]`; *exact*: `tokens[t] == wanted(t)`. Everything else is a
      *mismatch*.
    - `own = logits[p, tokens[t]]`, -inf if the token is not in 0..V-1. `regret = top_logits[p, 0] -
      own`.
    - *open*: a mismatch; lse[p] is finite; regret is finite; neither `tokens[t]` nor `wanted(t)` is
      in `strict_ids` or `eos_ids`. Only open mismatches are ever accepted: none from a row with a
      NaN or an infinite maximum, no token outside the target's vocabulary, no banned (-inf) token.
    - *anchor*: unless `anchor_threshold` is +inf, `not (relevance[p] < anchor_threshold)`; so a
      relevance of NaN makes an anchor.
    - *plausible*: every limit that is set holds. `regret <= max_regret`, or at an anchor `regret <=
      anchor_regret`, which nothing is if that is None. `tokens[t]` is among `top_ids[p, :top_k]`.
      With `log_prob = own - lse[p]`: `log_prob >= ln(min_prob)`; `log_prob >= min(ln(eps),
      ln(delta) - entropy[p])`. With `x = top_logits[p, i] - lse[p]`: `-sum(exp(x) x) >=
      min_entropy` over `i < entropy_top`, where an x of -inf adds nothing.
    - *loose*: open and plausible.
    - *shiftable*: open, and `regret <= shift_regret`.

    Paths. A path leads from the root down to a node, and nothing on it stands behind a token, be it
    the root's, that is in `eos_ids`. The mismatch at index i of a path *stands* if

    - it is loose; or shiftable, no anchor and *early*: one of the mismatches m among the w =
      `shift_window` nodes before it on the path has `wanted(m) == tokens[t]`, so the target wanted
      this token there and another one was emitted; or shiftable and *late*: one of the w nodes
      behind it on the path has the token `wanted(t)` (at an anchor too, for there the anchor's own
      word follows);
    - at least W = `window` nodes of the path follow it and the next W are all exact;
    - it is not preceded directly by `max_run` mismatches; and
    - `regret_used` plus the regrets of all mismatches up to and including it, added in path order
      in float64, is `<= regret_budget + regret_rate * i`; without a budget the sum is not looked
      at.

    A path stands if each of its mismatches does. Of the paths that stand and that no longer one
    that stands goes on from, the one with the largest `length - path_regret * regret` is taken,
    where `regret` is the float64 sum of its regrets in path order; of equals the one of least
    regret, and of these the one that ends in the lowest slot. So of a chain it is the longest path
    that stands, and of exact matches alone the longest.

    Results. `num_accepted` is the length of the path less one. `bonus_id` is `top_ids[last, 0]`,
    also behind an accepted end-of-sequence token, where the caller ignores it. `kind`: 0 for the
    root and exact nodes, 1 for a mismatch that is loose (shift or not), 2 for any other. `regret`
    is the path's, rounded once.

    Where the target samples instead of taking its best token, its samples stand in
    `top_ids[..., 0]` and all else is as `logit_stats` returns it, so `wanted` is the sample, and
    `regret` is against the best token still. For the rank to have a meaning `top_ids[..., :top_k]`
    are then the sample and the best of the others, in any order behind the first
    (`phases/accept.py` makes them so).

    Worked example, V = 4, `top_k=2`, no gate, no shifts. Chain `tokens = [0, 1, 2, 3]`; rows of
    logits `[0, 3, 2, 1]`, `[0, 2, 1, 3]`, `[3, 0, 2, 1]`, `[1, 0, 0, 0]`. Slot 1 is exact. Slot 2
    is a mismatch: its row wants 3, ranks 1 second and 2 third, so it is not plausible. The path is
    [0, 1], the bonus 3. With `top_k=3` slot 2 is loose with regret 2, and slot 3 (third, regret 2)
    as well: path [0, 1, 2, 3], bonus 0, regret 4. With `window=1` slot 3 has nothing behind it and
    then slot 2 has not either: [0, 1] again. With `top_k=2` and `shift_window=1` slot 2 is a late
    shift, for the 3 that it displaces is slot 3's token; slot 3, where 0 is wanted, is an early one
    for the same reason: path [0, 1, 2, 3], kinds 0, 0, 2, 2, regret 4.

    Args:
        logits: `[B, S, V]`, any float dtype; one element per node is read.
        tokens: int64 `[B, S]`, slot 0 the root.
        parents: int32 `[B, S]`.
        num_slots: int32 `[B]`.
        stats: `logit_stats(logits, top_k=K)` with K at least `policy.needed_top_k`.
        relevance: float32 or float64 `[B, S]`, visual relevance of every row; None only if the
            policy needs none.
        policy: What may be accepted. With `anchor_threshold="auto"` every row is an anchor here: it
            is `gate` that finds a threshold, and puts it in the rule that `accept_by_rule` takes.
        regret_used: float32 or float64 `[B]`, nats spent by earlier calls; None is 0.

    Returns:
        Acceptance.
    """
    batch_size = len(tokens)
    return accept_by_rule(
        logits,
        tokens,
        parents,
        num_slots,
        stats,
        relevance,
        regret_used,
        torch.tensor([policy.strict_ids] * batch_size, dtype=torch.int64).view(batch_size, -1),
        torch.tensor(policy.eos_ids, dtype=torch.int64),
        torch.tensor([policy.rule] * batch_size, dtype=torch.float32).view(batch_size, -1),
    )


def accept_by_rule(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_slots: torch.Tensor,
    stats: LogitStats,
    relevance: torch.Tensor | None,
    regret_used: torch.Tensor | None,
    strict_ids: torch.Tensor,
    eos_ids: torch.Tensor,
    rule: torch.Tensor,
) -> Acceptance:
    """`accept` with policies as numbers, one a sequence: `torch.ops.lvspec.accept`.

    Args:
        strict_ids: int64 `[B, E]`; -1 is none.
        eos_ids: int64 `[F]`, of all sequences.
        rule: float32 `[B, K]`, in every row the numbers of a `lvspec.rule.Rule`.
        logits, tokens, parents, num_slots, stats, relevance, regret_used: As for `accept`.
    """
    batch_size, num_rows, vocabulary = logits.shape
    top_ids, top_logits, lse, entropy = stats
    # A number is of its sequence, for all slots.
    number = Rule(*rule.to(logits.device, lse.dtype)[..., None].unbind(1))

    row = parents.long().clamp(0, num_rows - 1)
    sequence = torch.arange(batch_size, device=logits.device)[:, None]
    outside = (tokens < 0) | (tokens >= vocabulary)
    own = logits[sequence, row, tokens.masked_fill(outside, 0)].to(lse.dtype)
    own = own.masked_fill_(outside, -math.inf)
    regret = top_logits[..., 0].gather(1, row) - own
    log_prob = own - lse.gather(1, row)

    if relevance is None:
        anchor = (number.anchor_threshold < math.inf).expand_as(row)
    else:
        below = (relevance < number.anchor_threshold) | (number.anchor_threshold == math.inf)
        anchor = ~below.gather(1, row)
    loose = regret <= torch.where(anchor, number.anchor_regret, number.max_regret)
    loose &= log_prob >= number.min_log_prob
    ranks = torch.arange(top_ids.shape[2], device=logits.device)
    is_listed = top_ids[sequence, row] == tokens[..., None]
    is_listed &= ranks < number.top_k[..., None]
    loose &= is_listed.any(-1) | (number.top_k == 0)
    floor = torch.minimum(number.typical_log_delta - entropy, number.typical_log_eps)
    loose &= (log_prob >= floor.gather(1, row)) | (number.typical_log_eps == -math.inf)
    log_probs = top_logits - lse[..., None]
    terms = log_probs.exp() * log_probs.clamp(min=torch.finfo(lse.dtype).min)
    gate = -terms.masked_fill(ranks >= number.entropy_top[..., None], 0).sum(-1)
    loose &= (gate >= number.min_entropy).gather(1, row) | (number.min_entropy == -math.inf)
    shiftable = regret <= number.shift_regret

    usable = lse.isfinite().gather(1, row) & regret.isfinite()
    used = [0.0] * batch_size if regret_used is None else regret_used.tolist()
    fields = (tokens, parents, top_ids[..., 0], regret, usable, anchor, loose, shiftable)
    per_sequence = zip(
        num_slots.tolist(),
        used,
        (Rule(*numbers) for numbers in rule.tolist()),
        strict_ids.tolist(),
        *(field.tolist() for field in fields),
    )
    eos = set(eos_ids.tolist())
    paths, counts, bonus_ids, kinds, regrets = [], [], [], [], []
    for in_use, spent, of_sequence, strict, *slots in per_sequence:
        end = min(max(in_use, 1), num_rows)
        draft = _Draft(*(values[:end] for values in slots), guarded={*strict, *eos}, eos=eos)
        path = _best(draft, of_sequence, spent)
        kind = [
            (LOOSE if draft.is_loose[t] else SHIFT) if draft.is_mismatch[t] else EXACT for t in path
        ]
        padding = num_rows - len(path)
        paths.append(path + [-1] * padding)
        counts.append(len(path) - 1)
        bonus_ids.append(draft.best[path[-1]])
        kinds.append(kind + [NO_KIND] * padding)
        regrets.append(draft.lost(path))

    device = logits.device
    return Acceptance(
        torch.tensor(paths, dtype=torch.int32, device=device),
        torch.tensor(counts, dtype=torch.int32, device=device),
        torch.tensor(bonus_ids, dtype=torch.int64, device=device),
        torch.tensor(kinds, dtype=torch.uint8, device=device),
        torch.tensor(regrets, dtype=lse.dtype, device=device),
    )


class _Draft:
    """One sequence's draft as lists over slots, with the tests that do not depend on the path.

    Attributes:
        paths: Of every slot the path that ends in it, None if there is none.
    """

    def __init__(
        self,
        token: list[int],
        parent: list[int],
        best: list[int],
        regret: list[float],
        is_usable: list[bool],
        is_anchor: list[bool],
        is_loose: list[bool],
        is_shiftable: list[bool],
        *,
        guarded: set[int],
        eos: set[int],
    ) -> None:
        count = len(token)
        self.token, self.best, self.regret, self.is_anchor = token, best, regret, is_anchor
        self.paths: list[list[int] | None] = [[0]] + [None] * (count - 1)
        self.wanted = [-1] * count
        self.is_mismatch, self.is_loose, self.is_shiftable = (
            [False] * count,
            [False] * count,
            [False] * count,
        )
        for t in range(1, count):
            above = self.paths[parent[t]] if 0 <= parent[t] < t else None
            if above is None or token[parent[t]] in eos:
                continue
            self.paths[t] = [*above, t]
            self.wanted[t] = best[parent[t]]
            self.is_mismatch[t] = token[t] != self.wanted[t]
            is_open = (
                self.is_mismatch[t]
                and is_usable[t]
                and token[t] not in guarded
                and self.wanted[t] not in guarded
            )
            self.is_loose[t] = is_open and is_loose[t]
            self.is_shiftable[t] = is_open and is_shiftable[t]

    def lost(self, path: list[int]) -> float:
        """Nats. Not by sum(), which is more accurate, hence different, from Python 3.12 on."""
        total = 0.0
        for t in path:
            total += self.regret[t] if self.is_mismatch[t] else 0.0
        return total

    def is_early(self, path: list[int], i: int, levels: int) -> bool:
        """Whether the node at index i brings a token that one just before it displaced."""
        t, near = path[i], path[max(1, i - levels) : i]
        return not self.is_anchor[t] and any(
            self.is_mismatch[m] and self.wanted[m] == self.token[t] for m in near
        )

    def is_late(self, path: list[int], i: int, levels: int) -> bool:
        """Whether a node just behind the one at index i brings the token that it displaced."""
        return any(self.token[d] == self.wanted[path[i]] for d in path[i + 1 : i + 1 + levels])


def _best(draft: _Draft, rule: Rule, regret_used: float) -> list[int]:
    """The path that is taken."""
    standing = [path for path in draft.paths if path and _stands(draft, path, rule, regret_used)]
    inner = {t for path in standing for t in path[:-1]}
    ends = [path for path in standing if path[-1] not in inner]

    def preference(path: list[int]) -> tuple[float, float, int]:
        lost = draft.lost(path)
        return len(path) - 1 - rule.path_regret * lost, -lost, -path[-1]

    return max(ends, key=preference)


def _stands(draft: _Draft, path: list[int], rule: Rule, regret_used: float) -> bool:
    """Whether every mismatch on the path stands."""
    levels, window = int(rule.shift_window), int(rule.window)
    run, spent = 0, regret_used
    for i, t in enumerate(path):
        if not draft.is_mismatch[t]:
            run = 0
            continue
        run, spent = run + 1, spent + draft.regret[t]
        is_shift = draft.is_shiftable[t] and (
            draft.is_early(path, i, levels) or draft.is_late(path, i, levels)
        )
        followers = path[i + 1 : i + 1 + window]
        stands = (
            (draft.is_loose[t] or is_shift)
            and len(followers) == window
            and not any(draft.is_mismatch[d] for d in followers)
            and run <= rule.max_run
            and (
                rule.regret_budget == math.inf or spent <= rule.regret_budget + rule.regret_rate * i
            )
        )
        if not stands:
            return False
    return True
