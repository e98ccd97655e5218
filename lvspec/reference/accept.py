"""accept: which draft tokens stand, given the target's rows and a policy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lvspec.policy import AcceptancePolicy, Rule
from lvspec.reference.kinds import EXACT, LOOSE, NO_KIND, SHIFT
from lvspec.reference.logit_stats import LogitStats


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
    """Walk down the draft tree as far as the policy allows.

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
    - *plausible*: every limit that is set holds. `regret <= max_regret`. `tokens[t]` is among
      `top_ids[p, :top_k]`. With `log_prob = own - lse[p]`: `log_prob >= ln(min_prob)`;
      `log_prob >= min(ln(eps), ln(delta) - entropy[p])`. With `x = top_logits[p, i] - lse[p]`:
      `-sum(exp(x) x) >= min_entropy` over `i < entropy_top`, where an x of -inf adds nothing.
    - *loose*: open, not anchor, plausible.
    - *late* (within w = `shift_window` levels): open, and a given set of nodes below t has one with
      the token `wanted(t)` at most w levels below t.
    - *early*: open, and for one of the mismatches m among the last w nodes of the path above t (the
      root is no mismatch) `tokens[t] == wanted(m)`: the target wanted this token there, and another
      one was emitted.

    The walk. The path begins as [0]. Repeat: stop if the last token of the path, be it the root's,
    is in `eos_ids`. Take the lowest exact child of the last slot; if there is none, of its children
    that are loose, early, or late with respect to *all* descendants, the one of least regret, the
    lowest slot among equals; if there is none, stop.

    The cut. A mismatch at index i of the path *stands* if

    - it is loose, or early, or late with respect to the nodes of the path behind it, and
    - at least W = `window` nodes of the path follow it and the next W are all exact, and
    - it is not preceded directly by `max_run` mismatches, and
    - `regret_used` plus the regrets of all mismatches up to and including it, added in path order
      in float64, is `<= regret_budget`; without a budget the sum is not looked at.

    While some mismatch of the path does not stand, the path ends before the first such mismatch.
    (What stood may need what was cut, never the other way round, so the result is the longest
    prefix of the walk in which every mismatch stands.) On a device one thread does walk and cut,
    and a path of S entries is all its state.

    Results. `num_accepted` is the length of the path less one. `bonus_id` is `top_ids[last, 0]`,
    also behind an accepted end-of-sequence token, where the caller ignores it. `kind`: 0 for the
    root and exact nodes, 1 for a mismatch that is loose (shift or not), 2 for any other. `regret`
    is the float64 sum of the path's regrets, rounded once.

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
        policy: What may be accepted.
        regret_used: float32 or float64 `[B]`, nats spent by earlier calls; None is 0.

    Returns:
        Acceptance.
    """
    return accept_by_rule(
        logits,
        tokens,
        parents,
        num_slots,
        stats,
        relevance,
        policy.rule,
        strict_ids=policy.strict_ids,
        eos_ids=policy.eos_ids,
        regret_used=regret_used,
    )


def accept_by_rule(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_slots: torch.Tensor,
    stats: LogitStats,
    relevance: torch.Tensor | None,
    rule: Rule,
    *,
    strict_ids: tuple[int, ...] | list[int],
    eos_ids: tuple[int, ...] | list[int],
    regret_used: torch.Tensor | None,
) -> Acceptance:
    """`accept` with the policy as numbers, the form in which `torch.ops.lvspec.accept` has it."""
    batch_size, num_rows, vocabulary = logits.shape
    top_ids, top_logits, lse, entropy = stats

    row = parents.long().clamp(0, num_rows - 1)
    sequence = torch.arange(batch_size, device=logits.device)[:, None]
    outside = (tokens < 0) | (tokens >= vocabulary)
    own = logits[sequence, row, tokens.masked_fill(outside, 0)].to(lse.dtype)
    own = own.masked_fill_(outside, -math.inf)
    regret = top_logits[..., 0].gather(1, row) - own

    if math.isfinite(rule.anchor_threshold):
        loose = (relevance < rule.anchor_threshold).gather(1, row)
    else:
        loose = torch.full_like(outside, rule.anchor_threshold > 0)
    if rule.max_regret < math.inf:
        loose &= regret <= rule.max_regret
    if rule.top_k:
        loose &= (top_ids[..., : rule.top_k][sequence, row] == tokens[..., None]).any(-1)
    if rule.min_log_prob > -math.inf:
        loose &= own - lse.gather(1, row) >= rule.min_log_prob
    if rule.typical_log_eps > -math.inf:
        floor = (rule.typical_log_delta - entropy).clamp(max=rule.typical_log_eps)
        loose &= own - lse.gather(1, row) >= floor.gather(1, row)
    if rule.min_entropy > -math.inf:
        log_probs = top_logits[..., : rule.entropy_top] - lse[..., None]
        terms = log_probs.exp() * log_probs.clamp(min=torch.finfo(lse.dtype).min)
        loose &= (-terms.sum(-1) >= rule.min_entropy).gather(1, row)

    usable = (lse.isfinite().gather(1, row) & regret.isfinite()).tolist()
    guarded_ids = {*strict_ids, *eos_ids}
    used = [0.0] * batch_size if regret_used is None else regret_used.tolist()
    fields = (tokens, parents, top_ids[..., 0], regret, loose)
    per_sequence = zip(num_slots.tolist(), usable, used, *(field.tolist() for field in fields))

    paths, counts, bonus_ids, kinds, regrets = [], [], [], [], []
    for in_use, is_usable, spent, token, parent, best, lost, is_loose in per_sequence:
        end = min(max(in_use, 1), num_rows)
        draft = _Draft(token[:end], parent[:end], best, lost, is_usable, is_loose, guarded_ids)
        path = _cut(draft, _walk(draft, rule.shift_window, eos_ids), rule, spent)
        kind, total = [], 0.0
        for t in path:
            if not draft.is_mismatch[t]:
                kind.append(EXACT)
                continue
            kind.append(LOOSE if draft.is_loose[t] else SHIFT)
            total += lost[t]  # not sum(), which is more accurate, hence different, from Python 3.12
        padding = num_rows - len(path)
        paths.append(path + [-1] * padding)
        counts.append(len(path) - 1)
        bonus_ids.append(best[path[-1]])
        kinds.append(kind + [NO_KIND] * padding)
        regrets.append(total)

    device = logits.device
    return Acceptance(
        torch.tensor(paths, dtype=torch.int32, device=device),
        torch.tensor(counts, dtype=torch.int32, device=device),
        torch.tensor(bonus_ids, dtype=torch.int64, device=device),
        torch.tensor(kinds, dtype=torch.uint8, device=device),
        torch.tensor(regrets, dtype=lse.dtype, device=device),
    )


class _Draft:
    """One sequence's draft as lists over slots, with the tests that do not depend on the path."""

    def __init__(
        self,
        token: list[int],
        parent: list[int],
        best: list[int],
        regret: list[float],
        is_usable: list[bool],
        is_loose: list[bool],
        guarded_ids: set[int],
    ) -> None:
        self.token = token
        self.parent = parent
        self.regret = regret
        nodes = range(1, len(token))
        self.children: list[list[int]] = [[] for _ in token]
        self.wanted = [-1] * len(token)
        self.is_mismatch = [False] * len(token)
        self.is_open = [False] * len(token)
        self.is_loose = [False] * len(token)
        for t in nodes:
            if not 0 <= parent[t] < t:
                continue
            self.children[parent[t]].append(t)
            wanted = best[parent[t]]
            self.wanted[t] = wanted
            if token[t] != wanted:
                self.is_mismatch[t] = True
                guarded = token[t] in guarded_ids or wanted in guarded_ids
                self.is_open[t] = is_usable[t] and not guarded
                self.is_loose[t] = self.is_open[t] and is_loose[t]

    def is_early(self, t: int, above: list[int], levels: int) -> bool:
        """Whether t brings a token that one of the last `levels` nodes above it displaced."""
        near = above[max(1, len(above) - levels) :]
        return self.is_open[t] and any(
            self.is_mismatch[m] and self.wanted[m] == self.token[t] for m in near
        )

    def is_late(self, t: int, levels: int) -> bool:
        """Whether a descendant of t, at most `levels` below, brings the token that t displaced."""
        if not self.is_open[t]:
            return False
        level = [t]
        for _ in range(levels):
            level = [child for node in level for child in self.children[node]]
            if any(self.token[node] == self.wanted[t] for node in level):
                return True
        return False


def _walk(draft: _Draft, shift_window: int, eos_ids: tuple[int, ...] | list[int]) -> list[int]:
    """Slots from the root down, before anything is cut."""
    path = [0]
    while draft.token[path[-1]] not in eos_ids:
        children = draft.children[path[-1]]
        exact = [t for t in children if not draft.is_mismatch[t]]
        if exact:
            path.append(exact[0])
            continue
        tolerable = [
            t
            for t in children
            if draft.is_loose[t]
            or draft.is_early(t, path, shift_window)
            or draft.is_late(t, shift_window)
        ]
        if not tolerable:
            break
        path.append(min(tolerable, key=lambda t: (draft.regret[t], t)))
    return path


def _cut(draft: _Draft, path: list[int], rule: Rule, regret_used: float) -> list[int]:
    """The path, shortened until every mismatch on it stands."""
    shortened = True
    while shortened:
        shortened = False
        run, spent = 0, regret_used
        for i, t in enumerate(path):
            if not draft.is_mismatch[t]:
                run = 0
                continue
            run, spent = run + 1, spent + draft.regret[t]
            followers = path[i + 1 : i + 1 + rule.window]
            behind = path[i + 1 : i + 1 + rule.shift_window]
            stands = (
                (
                    draft.is_loose[t]
                    or draft.is_early(t, path[:i], rule.shift_window)
                    or any(draft.token[d] == draft.wanted[t] for d in behind)
                )
                and len(followers) == rule.window
                and not any(draft.is_mismatch[d] for d in followers)
                and run <= rule.max_run
                and (rule.regret_budget == math.inf or spent <= rule.regret_budget)
            )
            if not stands:
                path = path[:i]
                shortened = True
                break
    return path
