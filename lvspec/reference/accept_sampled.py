"""accept_sampled: which tokens of a drafted chain stand where the target samples."""

from __future__ import annotations

import torch

from lvspec.reference.accept import Acceptance
from lvspec.reference.kinds import EXACT, NO_KIND


def accept_sampled(
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    num_slots: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    temperature: float = 1.0,
) -> Acceptance:
    """Speculative sampling of a chain: what is emitted is distributed as samples of the target.

    The rule of Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative
    Decoding" (ICML 2023), with the uniforms given, so that the result is a function of the
    arguments. Everything below is per sequence. `n = num_slots` brought into 1..S; slots from n on
    do not exist. Slot t stands behind slot t - 1.

    For a row of logits x with maximum m the *weights* are `exp((x - m) / temperature)` and the
    *probabilities* the weights divided by their sum: p those of `logits[r]`, q those of
    `draft_logits[r]`, from which `tokens[r + 1]` was drawn. p is 0 for a token that is not in
    0..V-1, q for one that is not in 0..Vd-1. Without `draft_logits` the draft chose its tokens in
    some other way, and q is 1 for the token and 0 elsewhere. A row with a NaN or an infinite
    maximum is *irregular* and has no probabilities.

    The tests. Slot t = r + 1 is accepted if both its rows are regular and
    `uniforms[t] * q(tokens[t]) < p(tokens[t])`. So a token of target probability 0 never is, also
    if the uniform is 0; and one of draft probability 0, which the draft cannot have drawn, is if
    the target's is not 0, as the limit of small q wants it. The path is slot 0 and the slots in
    front of the first that is not accepted.

    The bonus token follows the last slot r of the path. If row r of the target is irregular it is
    the first maximum, as `logit_stats` ranks: NaN as -inf, ties to the lower id. Otherwise it is
    drawn, with weights `max(p - q, 0)` if slot r + 1 exists (it was rejected), with p if not, if
    row r of the draft is irregular, or if rounding leaves all of `max(p - q, 0)` 0. The draw: the
    lowest id at which the running sum of the weights exceeds `uniforms[0]` times their total; if
    there is none, for the uniform was not below 1, the last id of positive weight. An id of weight
    0 is never drawn.

    Weights and probabilities are float32 (float64 for float64 `logits`), running sums float64.

    Worked example, V = Vd = 3, temperature 1, logits the logarithms of these probabilities. Tokens
    `[0, 1, 0]`, uniforms `[0.5, 0.4, 0.5]`. Row 0: p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4); slot 1
    is accepted, for 0.4 * 1/2 < 1/4. Row 1: p = (1/8, 3/8, 1/2), q = (1/2, 1/4, 1/4); slot 2 is
    not, for 0.5 * 1/2 >= 1/8. The bonus has weights (0, 1/8, 1/4), of which the running sums are 0,
    1/8 and 3/8; half of 3/8 is first exceeded at id 2. Path [0, 1], bonus 2. With 0.2 in place of
    the last uniform slot 2 is accepted, and the bonus drawn from p of row 2. Without `draft_logits`
    slot 1 is rejected, for 0.4 >= 1/4, and the bonus has weights (1/2, 0, 1/4): path [0], bonus 0.

    Args:
        logits: `[B, S, V]`, any float dtype, the target's.
        draft_logits: `[B, S - 1, Vd]`, any float dtype: row r is what `tokens[:, r + 1]` was drawn
            from, at the same temperature. None if the tokens were chosen without sampling.
        tokens: int64 `[B, S]`, slot 0 the root.
        num_slots: int32 `[B]`.
        uniforms: float32 `[B, S]` in [0, 1), independent of each other and of the tokens:
            `uniforms[:, t]` tests slot t, `uniforms[:, 0]` draws the bonus token.
        temperature: Finite and > 0, for both models.

    Returns:
        Acceptance: `path`, `num_accepted` and `bonus_id` as above, `kind` 0 along the path (255
        behind it) and `regret` 0.
    """
    batch_size, num_rows, vocabulary = logits.shape
    device = logits.device
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    target, target_regular = _probabilities(logits.to(dtype), temperature)

    drawn = tokens[:, 1:]
    # Row r: what slot r + 1 was drawn from. The last row, from which nothing was, remains 0.
    draft = torch.zeros_like(target)
    draft_regular = torch.ones_like(drawn, dtype=torch.bool)
    if draft_logits is None:
        ids = torch.arange(vocabulary, device=device)
        draft[:, :-1] = (drawn[..., None] == ids).to(dtype)
        proposed = torch.ones_like(drawn, dtype=dtype)
    else:
        probabilities, draft_regular = _probabilities(draft_logits.to(dtype), temperature)
        proposed = _probability_of(drawn, probabilities)
        shared = min(vocabulary, draft_logits.shape[2])
        draft[:, :-1, :shared] = probabilities[..., :shared]

    accepted = uniforms[:, 1:].to(dtype) * proposed < _probability_of(drawn, target[:, :-1])
    accepted &= target_regular[:, :-1] & draft_regular
    last_row = num_slots.long().clamp(1, num_rows) - 1
    accepted &= torch.arange(num_rows - 1, device=device) < last_row[:, None]
    num_accepted = accepted.long().cumprod(1).sum(1)

    sequence = torch.arange(batch_size, device=device)
    row = target[sequence, num_accepted]
    residual = (row - draft[sequence, num_accepted]).clamp_(min=0)
    is_residual = (num_accepted < last_row) & (residual > 0).any(-1)
    weights = torch.where(is_residual[:, None], residual, row)
    ranked = logits[sequence, num_accepted].nan_to_num(
        nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf
    )
    bonus_id = torch.where(
        target_regular[sequence, num_accepted],
        _draw(weights, uniforms[:, 0]),
        (ranked == ranked.amax(-1, keepdim=True)).byte().argmax(-1),  # the first of equals
    )

    index = torch.arange(num_rows, dtype=torch.int32, device=device).expand(batch_size, -1)
    is_path = index <= num_accepted[:, None]
    return Acceptance(
        index.masked_fill(~is_path, -1),
        num_accepted.int(),
        bonus_id,
        torch.where(is_path, EXACT, NO_KIND).to(torch.uint8),
        torch.zeros(batch_size, dtype=dtype, device=device),
    )


def _probabilities(values: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of every row, 0 throughout if it is irregular, and whether it is regular."""
    highest = values.amax(-1, keepdim=True)  # NaN if there is one in the row
    is_regular = highest.isfinite()
    # What the type rounds to 0 or inf would make NaN of 0 / 0 and -inf / inf.
    limits = torch.finfo(values.dtype)
    temperature = min(max(temperature, limits.tiny), limits.max)
    weights = ((values - highest) / temperature).exp_()
    weights = weights.masked_fill_(~is_regular, 0)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill_(~is_regular, 1), is_regular.squeeze(-1)


def _probability_of(tokens: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Of one token a row, 0 for a token that is none."""
    outside = (tokens < 0) | (tokens >= probabilities.shape[-1])
    ids = tokens.masked_fill(outside, 0)[..., None]
    return probabilities.gather(-1, ids).squeeze(-1).masked_fill(outside, 0)


def _draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The lowest id whose running sum exceeds `uniforms` times the total, one a row."""
    sums = weights.double().cumsum(-1)
    is_behind = sums > uniforms.double()[:, None] * sums[:, -1:]
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).byte().argmax(-1)
    return torch.where(is_behind.any(-1), is_behind.byte().argmax(-1), last)
