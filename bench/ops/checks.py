"""Results are compared with `lvspec.reference` before anything is timed.

Integers are equal. Floats err against float64 at most twice as much as eager PyTorch in the inputs'
dtype, or two roundings of the largest number. What does not depend on other rows by specification
is checked for some of them: float64 copies of everything would not fit.
"""

from __future__ import annotations

import torch
from ops.case_inputs import (
    EXPAND_WIDTH,
    AcceptInputs,
    CommitInputs,
    ExpandInputs,
    GateInputs,
    ImportanceInputs,
    SampledInputs,
    VerifyInputs,
)
from ops.linear_cases import LinearInputs
from ops.peers import (
    eager_attention,
    eager_importance,
    eager_logits,
    expanded_linear,
    torch_statistics,
)
from ops.reasons import Wrong
from torch import Tensor

from lvspec import ops, reference
from lvspec.policy import AcceptancePolicy

MAX_ROWS = 96
MAX_OUTPUTS = 4096


def check_verify_attention(inputs: VerifyInputs, got: ops.VerifyAttention) -> None:
    """The first and the last sequence; their results do not depend on the others."""
    for sequence in sorted({0, inputs.q.shape[0] - 1}):
        one = VerifyInputs(
            *(x[sequence : sequence + 1] for x in inputs[:6]),
            ops.SplitPlan(*(x[sequence : sequence + 1] for x in inputs.plan)),
        )
        exact = reference.verify_attention(one.q.double(), *one[1:6])
        out, mass, peak = eager_attention(one)
        lse = eager_logits(one).logsumexp(-1)
        # Sums of exp(m - lse) over pieces: a rounding of lse, as large as lse, is in the exponent.
        exponent = _EPS * (1 + exact.lse.abs().max().item())
        for name, ours, theirs in zip(got._fields, got, (out, lse, mass, peak)):
            truth = getattr(exact, name)
            derived = 0.0 if name == "lse" else exponent * truth.abs().max().item()
            _check_floats(name, ours[sequence : sequence + 1], theirs, truth, derived)


def check_logit_stats(logits: Tensor, top_k: int, got: ops.LogitStats) -> None:
    """Up to MAX_ROWS rows from everywhere."""
    rows = logits.flatten(0, 1)
    count = min(MAX_ROWS, len(rows))
    chosen = torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()
    values = rows[chosen][None]
    ours = ops.LogitStats(*(field.flatten(0, 1)[chosen][None] for field in got))
    exact = reference.logit_stats(values.double(), top_k=top_k)
    _check_equal("top_ids", ours.top_ids, exact.top_ids)
    _check_equal("top_logits", ours.top_logits, exact.top_logits.to(ours.top_logits.dtype))
    _, _, lse, entropy = torch_statistics(values, top_k)
    _check_floats("lse", ours.lse, lse, exact.lse)
    _check_floats("entropy", ours.entropy, entropy, exact.entropy)


def check_accept(inputs: AcceptInputs, policy: AcceptancePolicy, got: ops.Acceptance) -> None:
    expected = reference.accept(*inputs, policy)
    for name, ours, theirs in zip(got._fields, got, expected):
        _check_equal(name, ours, theirs)


def check_gate(inputs: GateInputs, got: ops.Gate) -> None:
    expected = reference.gate(*inputs)
    for name, ours, theirs in zip(got._fields, got, expected):
        _check_equal(name, ours, theirs)


def check_accept_sampled(inputs: SampledInputs, got: ops.Acceptance) -> None:
    """The bonus token may be the one that a slightly different uniform draws.

    By how much: a weight errs by the rounding of its exponent, which is at most 16 where weights
    are more than 1e-7 of the largest.
    """
    slack = 32 * _EPS
    for sequence in range(inputs.tokens.shape[0]):
        logits, draft_logits, tokens, num_slots, uniforms = (
            x[sequence : sequence + 1] for x in inputs
        )
        drawn = []
        for offset in (-slack, 0, slack):
            moved = uniforms.double()
            moved[:, 0] += offset
            given = (logits.double(), draft_logits.double(), tokens, num_slots, moved)
            drawn.append(reference.accept_sampled(*given))
        ours = ops.Acceptance(*(field[sequence : sequence + 1] for field in got))
        for name in ("path", "num_accepted", "kind", "regret"):
            _check_equal(name, getattr(ours, name), getattr(drawn[1], name))
        low, bonus, high = (int(result.bonus_id) for result in drawn)
        if not low <= int(ours.bonus_id) <= high:
            raise Wrong(f"bonus_id: expected {bonus}, got {int(ours.bonus_id)}")


def check_commit_kv(inputs: CommitInputs, before: list[Tensor], after: list[Tensor]) -> None:
    """Bits of the rows around those that may change, `before` a copy; see `committed_rows`."""
    first = max(int(inputs.kv_len.min()) - 4, 0)
    lengths = inputs.kv_len - first
    reference.commit_kv(*before, lengths, *inputs[3:])
    for name, ours, theirs in zip(("k_cache", "v_cache"), after, before):
        _check_equal(name, ours, theirs)


def check_visual_importance(inputs: ImportanceInputs, got: Tensor) -> None:
    """The first and the last sequence."""
    for sequence in sorted({0, inputs.q.shape[0] - 1}):
        one = ImportanceInputs(*(x[sequence : sequence + 1] for x in inputs))
        exact = reference.visual_importance(
            one.q.double(), one.k_cache, one.kv_len, one.visual, one.lse.double()
        )
        length = int(one.kv_len)
        ours = got[sequence : sequence + 1]
        theirs = torch.zeros_like(ours)
        theirs[:, :length] = eager_importance(one)
        # Sums of exp(x - lse): roundings of both are in the exponent, and x is at most lse.
        exponent = _EPS * (1 + 2 * one.lse.abs().max().item())
        _check_floats("importance", ours, theirs, exact, exponent * exact.abs().max().item())
        if bool((ours.masked_fill(one.visual != 0, 0) != 0).any()):
            raise Wrong("importance: expected 0 where no video is")


def check_expand_tree(inputs: ExpandInputs, top_k: int, got: ops.TreeLevel) -> None:
    logits, log_probs, slots = inputs
    width = got.tokens.shape[1]
    exact = reference.expand_tree(
        logits.double(), log_probs.double(), slots, width=width, top_k=top_k
    )
    _check_equal("tokens", got.tokens, exact.tokens)
    _check_equal("parents", got.parents, exact.parents)
    values = logits.float()
    best = values.log_softmax(-1).topk(top_k, dim=-1).values + log_probs[..., None]
    theirs = best.flatten(1).sort(dim=-1, descending=True).values[:, :width]
    # Two roundings of logit - lse, each as large as what it is the difference of.
    derived = _EPS * (values.amax() + values.logsumexp(-1).amax()).item()
    _check_floats("log_probs", got.log_probs, theirs, exact.log_probs, derived)


def expand_width(inputs: ExpandInputs) -> tuple[int, int]:
    """(width, top_k) that the inputs allow."""
    nodes, vocabulary = inputs.logits.shape[1:]
    top_k = min(EXPAND_WIDTH, vocabulary)
    return min(EXPAND_WIDTH, nodes * top_k), top_k


def check_scaled_linear(inputs: LinearInputs, got: Tensor) -> None:
    """Up to MAX_OUTPUTS weight rows from everywhere."""
    outputs = inputs.weight.shape[0]
    count = min(MAX_OUTPUTS, outputs)
    chosen = torch.linspace(0, outputs - 1, count, device=got.device).round().long()
    # Rows of float8 cannot be selected everywhere, bytes can.
    weight = inputs.weight.view(torch.int8)[chosen].view(inputs.weight.dtype)
    scale = inputs.scale[chosen]
    exact = reference.scaled_linear(inputs.x.double(), weight, scale.double())
    theirs = expanded_linear(inputs.x, weight, scale)
    _check_floats("result", got[..., chosen], theirs, exact)


def _check_equal(name: str, ours: Tensor, theirs: Tensor) -> None:
    different = ours != theirs
    if bool(different.any()):
        index = tuple(different.nonzero()[0].tolist())
        count = int(different.sum())
        raise Wrong(
            f"{name}: expected {theirs[index].item()} at {index}, got {ours[index].item()}; "
            f"{count} of {different.numel()} differ"
        )


def _check_floats(
    name: str, ours: Tensor, theirs: Tensor, exact: Tensor, derived: float = 0.0
) -> None:
    """`theirs` is eager's result, whose dtype says what a rounding is; `derived` is the error of
    float32 operands that the specification itself has."""
    mistake = _error(ours, exact)
    rounding = torch.finfo(theirs.dtype).eps * exact.abs().max().item()
    allowed = 2 * max(_error(theirs, exact), rounding, derived)
    if not mistake <= allowed:  # NaN is wrong
        raise Wrong(f"{name}: expected an error of at most {allowed:.3g}, got {mistake:.3g}")


def _error(values: Tensor, exact: Tensor) -> float:
    return (values.double() - exact.double()).abs().max().item()


_EPS = torch.finfo(torch.float32).eps
