"""generate with loose policies: what it reports is what the target computes for the final tokens.

Relevance, choices and regret are recomputed from one HF forward over the emitted tokens, with eager
attention, and the acceptance is replayed from the trace in plain Python.
"""

import json
import math
from functools import partial

import pytest
import torch
from policies import gated

from lvspec import AcceptancePolicy, DecodeConfig, generate, ops
from lvspec.engine.result import TraceStep
from lvspec.phases.outcome import Rows
from lvspec.phases.slots import Draft, DraftShape
from lvspec.reference.kinds import KIND_NAMES

GATED = 0.12  # about the median relevance of the random target
POLICIES = {
    "strict": AcceptancePolicy.strict(),
    "no gate": gated(math.inf, top_k=2),
    "gate": gated(GATED, top_k=2, shift_window=0),
    "gate and shifts": gated(GATED, shift_window=3),
    "shifts alone": gated(math.inf, max_regret=0.0, shift_window=3),
    "budget": gated(math.inf, regret_budget=0.5),
    "window": gated(math.inf, top_k=16, window=1),
    "relaxed": AcceptancePolicy.relaxed(top_k=16, max_regret=1.0),
    "typical": AcceptancePolicy.typical(),
    "fly": AcceptancePolicy.fly(window=1),
}


@pytest.fixture(params=POLICIES)
def policy(request):
    return POLICIES[request.param]


@pytest.fixture(params=["random", "noisy"])
def draft(request, random_pair, noisy_draft):
    return {"random": random_pair[1], "noisy": noisy_draft}[request.param]


@pytest.fixture
def inputs(make_prompt):
    return make_prompt(3, ("video", 4, 6, 6), 4, ("image", 4, 4), 5, seed=3)


def _generate(target, draft, inputs, policy, **config):
    config = DecodeConfig(**{"eos_ids": (), "max_new_tokens": 40, "gamma": 6, **config})
    return generate(target, draft, inputs, policy=policy, config=config)


def _replay(generation):
    """Tokens and kinds by the trace, those behind the end of the output included."""
    tokens, kinds = generation.tokens[0, :1].tolist(), ["bonus"]
    for step in generation.trace.steps():
        assert step.position == len(tokens)
        assert len(step.kinds) == step.num_accepted
        tokens += [*step.drafted[: step.num_accepted], step.wanted[step.num_accepted]]
        kinds += [*step.kinds, "bonus"]
    return tokens, kinds


def test_replay_of_the_trace(random_pair, draft, inputs, policy, hf_rows):
    target = random_pair[0]
    generation = _generate(target, draft, inputs, policy, trace=True)
    stats, steps = generation.stats, generation.trace.steps()
    tokens, kinds = _replay(generation)
    assert generation.tokens[0].tolist() == tokens[:40]
    assert [KIND_NAMES[code] for code in generation.kinds[0]] == kinds[:40]

    logits, peaks = hf_rows(target, inputs, tokens)
    regret = 0.0
    for step in steps:
        for slot in range(step.num_accepted + 1):
            row = logits[step.position + slot]
            assert step.wanted[slot] == int(row.argmax())
            assert step.relevance[slot] == pytest.approx(
                float(peaks[step.position + slot]), abs=1e-5
            )
        for slot, kind in enumerate(step.kinds):
            token, row = step.drafted[slot], logits[step.position + slot]
            assert (kind == "exact") == (token == step.wanted[slot])
            if step.position + slot < 40:  # what is behind the end is not output
                regret += float(row.max() - row[token])

    accepted = [step.num_accepted for step in steps]
    shown = [min(step.num_accepted + 1, 40 - step.position) for step in steps]
    assert stats.num_accepted == [count - 1 for count in shown]
    assert stats.tau == pytest.approx(sum(stats.num_accepted) / len(steps) + 1)
    assert stats.tau == pytest.approx(39 / len(steps)), "the first token is the prompt's"
    assert stats.acceptance_by_position == [
        pytest.approx(sum(count > j for count in accepted) / len(accepted)) for j in range(6)
    ]
    assert stats.regret == pytest.approx(regret, abs=1e-4)
    assert stats.counts == {
        **{name: kinds[:40].count(name) for name in KIND_NAMES},
        "rejected": 6 * len(steps) - sum(accepted),
    }
    is_anchor = generation.relevance[0] >= policy.anchor_threshold
    is_gated = math.isfinite(policy.anchor_threshold)
    assert stats.num_anchors == (int(is_anchor.sum()) if is_gated else 0)
    assert stats.anchor_share == (stats.num_anchors / 39 if is_gated else None)
    assert stats.gate == ("on" if is_gated else "none")


def test_a_trace_holds_the_rows(random_pair, noisy_draft, inputs, hf_rows):
    """Whatever of a chain stands: what HF computes over the whole of it, and through JSON."""
    target = random_pair[0]
    generation = _generate(target, noisy_draft, inputs, POLICIES["gate"], trace=True)
    tokens, steps = generation.tokens[0].tolist(), generation.trace.steps()
    assert any(step.num_accepted < len(step.drafted) for step in steps)
    for step in steps[:4]:
        chain = tokens[: step.position] + step.drafted
        logits, _ = hf_rows(target, inputs, chain)
        rows = logits[step.position :].log_softmax(-1)
        best = rows.topk(5)
        assert step.top_ids == best.indices.tolist()
        close = partial(torch.testing.assert_close, atol=1e-4, rtol=0)
        close(torch.tensor(step.top_log_probs), best.values)
        own = rows[:-1].gather(1, torch.tensor(step.drafted)[:, None])[:, 0]
        close(torch.tensor(step.log_probs), own)
        close(torch.tensor(step.regrets), best.values[:-1, 0] - own)
        close(torch.tensor(step.entropies), -(rows.exp() * rows).sum(-1))
    told = json.loads(json.dumps(generation.to_dict(), allow_nan=False))["trace"]
    assert [TraceStep.from_dict(values) for values in told] == steps
    with pytest.raises(ValueError, match="trace: expected steps with position, drafted"):
        TraceStep.from_dict({"position": 1})


def test_a_trace_of_a_sample_and_of_no_number():
    """The sample stands first, and a token that is banned has no finite number."""
    draft = Draft(torch.tensor([[0, 1, 3]]), DraftShape.chain(2, batch_size=1, device="cpu"))
    logits = torch.tensor([[[0.0, 2.0, 1.0, -math.inf]] * 3])
    stats = ops.logit_stats(logits, top_k=2)
    stats = stats._replace(top_ids=stats.top_ids.flip(-1))
    rows = Rows.of(logits, draft, stats)
    lse = math.log(1 + math.e + math.e**2)
    assert rows.top_log_probs[0, 0].tolist() == pytest.approx([1 - lse, 2 - lse])
    assert rows.log_probs[0, 1:].tolist() == [pytest.approx(2 - lse), -math.inf]
    assert rows.regrets[0, 1:].tolist() == [0, math.inf]


def test_policies_differ(random_pair, noisy_draft, inputs):
    """Otherwise the replay above would show nothing."""
    runs = {
        name: _generate(random_pair[0], noisy_draft, inputs, policy)
        for name, policy in POLICIES.items()
    }
    tau = {name: run.stats.tau for name, run in runs.items()}
    assert all(tau["strict"] < tau[name] for name in ("gate", "no gate", "budget"))
    assert runs["budget"].stats.regret <= 0.5
    loose = {name: run.stats.counts["loose"] > 0 for name, run in runs.items()}
    without = ("strict", "shifts alone")
    assert loose == {name: name not in without for name in POLICIES}


def test_gate_by_independent_relevance(random_pair, noisy_draft, make_prompt, hf_rows):
    """Top two and below the threshold, by HF alone: accepted if and only if both hold."""
    target, seen = random_pair[0], set()
    for seed in range(3):
        inputs = make_prompt(3, ("video", 4, 6, 6), 5, seed=seed)
        generation = _generate(target, noisy_draft, inputs, POLICIES["gate"], trace=True)
        logits, peaks = hf_rows(target, inputs, _replay(generation)[0])
        for step in generation.trace.steps():
            for slot, token in enumerate(step.drafted[: step.num_accepted + 1]):
                row, peak = logits[step.position + slot], float(peaks[step.position + slot])
                plausible = token in row.topk(2).indices
                anchor = peak >= GATED
                expected = token == int(row.argmax()) or (plausible and not anchor)
                assert (slot < step.num_accepted) == expected
                seen.add((plausible, anchor, expected))
    # Rejected by the gate alone, by the rank alone, and accepted by both.
    assert {(True, True, False), (False, False, False), (True, False, True)} <= seen


@pytest.mark.parametrize("which", ["random", "noisy"])
def test_relevance_of_every_token(random_pair, noisy_draft, inputs, which, hf_rows):
    target = random_pair[0]
    draft = random_pair[1] if which == "random" else noisy_draft
    policy = AcceptancePolicy(anchor_threshold=1.0, top_k=16)
    generation = _generate(target, draft, inputs, policy, gamma=5)
    tokens = generation.tokens[0].tolist()
    peaks = hf_rows(target, inputs, tokens)[1][:-1]
    assert generation.relevance.dtype == torch.float32
    assert math.isnan(generation.relevance[0, 0])
    torch.testing.assert_close(generation.relevance[0, 1:], peaks[1:], atol=1e-5, rtol=0)
    assert peaks[1:].std() > 1e-3, "the wrong row would pass"
    assert {"loose", "bonus"} <= {KIND_NAMES[code] for code in generation.kinds[0]}


def test_relevance_is_not_computed_where_nothing_needs_it(random_pair, inputs):
    target, draft = random_pair
    for policy in (AcceptancePolicy.strict(), AcceptancePolicy.relaxed()):
        assert _generate(target, draft, inputs, policy).relevance.isnan().all()
    traced = _generate(target, draft, inputs, AcceptancePolicy.strict(), trace=True)
    assert not traced.relevance[0, 1:].isnan().any()
    assert _generate(target, draft, inputs, AcceptancePolicy.strict()).trace is None


def test_scorer_by_name_and_by_function(random_pair, noisy_draft, inputs):
    target = random_pair[0]
    policy = gated(0.5, shift_window=0)

    def everything(output):
        return torch.ones(output.logits.shape[:2])

    mass = _generate(target, noisy_draft, inputs, policy, scorer="attention_mass")
    peak = _generate(target, noisy_draft, inputs, policy, scorer="attention_peak")
    assert (mass.relevance[0, 1:] > peak.relevance[0, 1:])[: peak.stats.num_accepted[0] + 1].all()
    own = _generate(target, noisy_draft, inputs, policy, scorer=everything)
    assert own.stats.counts["loose"] == 0
    assert own.relevance[0, 1:].eq(1).all()


def test_regret_budget_holds_over_iterations(random_pair, noisy_draft, inputs):
    spent = []
    for budget in (0.0, 0.5, 1.0, 4.0):
        policy = AcceptancePolicy(anchor_threshold=math.inf, regret_budget=budget)
        generation = _generate(random_pair[0], noisy_draft, inputs, policy, gamma=2)
        assert generation.stats.regret <= budget
        spent.append(generation.stats.regret)
    assert spent[0] == 0 < spent[-1]
    assert spent == sorted(spent)


def test_default_policy_and_config(random_pair, inputs, monkeypatch):
    target, draft = random_pair
    config = DecodeConfig(max_new_tokens=9, eos_ids=())
    generation = generate(target, draft, inputs, config=config)
    assert not generation.relevance[0, 1:].isnan().any(), "lvspec() needs relevance"
    first = int(generation.tokens[0, 0])
    monkeypatch.setattr(target.generation_config, "eos_token_id", first)
    generation = generate(target, draft, inputs)
    assert generation.tokens.tolist() == [[first]]
    assert DecodeConfig().gamma == "auto"
    assert generation.stats.gamma == generation.stats.gamma_choice["gamma"]
