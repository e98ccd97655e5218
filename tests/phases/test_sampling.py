"""Sampling: what comes out is distributed as the target's own samples, and a seed repeats it.

Distributions are compared by chi-square with a bound that a right rule passes but once in ten
thousand seeds (Laurent and Massart 2000, lemma 1); the seeds are fixed. The same statistic refuses
rules that are a little wrong.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from policies import gated
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.generation import logits_process

import lvspec.phases.accept
from lvspec import AcceptancePolicy, DecodeConfig, generate, generate_many, ops, tree
from lvspec.phases import sampling
from lvspec.phases.accept import accept
from lvspec.phases.draft import Draft, DraftShape
from lvspec.phases.needs import Needs
from lvspec.phases.sampling import Sampler, draw, draw_coupled
from lvspec.phases.state import DecodeState
from lvspec.phases.verify import Verification
from lvspec.shapes.model_configs import target_config

INTERPRETED = ops.active_backend("cpu") == "triton"
STRICT = AcceptancePolicy.strict()
V = 7  # of the phases on their own
MANY = 40 if INTERPRETED else 5000


class Fit:
    """Chi-square of counts against probabilities, and the bound for it."""

    def __init__(self):
        self.statistic, self.freedom = 0.0, 0

    def add(self, counts, probabilities):
        counts, expected = counts.double(), probabilities.double() * counts.sum()
        assert not counts[expected == 0].any(), "a token that the target never says"
        is_rare = (
            expected < 8
        )  # cells for which the statistic is not yet chi-square: taken together
        counts = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]])
        expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
        counts, expected = counts[expected > 0], expected[expected > 0]
        self.statistic += float(((counts - expected) ** 2 / expected).sum())
        self.freedom += len(counts) - 1

    @property
    def bound(self):
        nats = math.log(1e4)
        return self.freedom + 2 * math.sqrt(self.freedom * nats) + 2 * nats

    @property
    def is_good(self):
        return self.statistic <= self.bound


def a_sampler(batch_size, slots, **config):
    config = DecodeConfig(**{"temperature": 1.0, "seed": 5, **config})
    sampler = Sampler(config, batch_size=batch_size, num_slots=slots, device=torch.device("cpu"))
    for place in range(batch_size):
        sampler.begin(place, place)
    sampler.advance()
    return sampler


# The phases on their own: the target's row depends on the token at the slot alone, so every token
# that is emitted has to be distributed as the row of the token before it.


def emitted_pairs(draft, acceptance):
    """int64 `[n, 2]`: every emitted token behind the one before it."""
    path, bonus = acceptance.path.tolist(), acceptance.bonus_id.tolist()
    found = []
    for tokens, slots, end in zip(draft.tokens.tolist(), path, bonus, strict=True):
        said = [tokens[slot] for slot in slots if slot >= 0] + [end]
        found += zip(said[:-1], said[1:], strict=True)
    return torch.tensor(found)


def fit_of_rows(pairs, rows):
    fit = Fit()
    counts = torch.zeros(V, V).index_put_(tuple(pairs.T), torch.ones(len(pairs)), accumulate=True)
    for before in range(V):
        if counts[before].any():
            fit.add(counts[before], rows[before].softmax(-1))
    return fit


def sampled_chain(rows, draft_rows, sampler, gamma):
    tokens, logits = [torch.randint(V, (MANY, 1))], []
    for level in range(gamma):
        logits.append(draft_rows[tokens[-1]])
        tokens.append(draw(logits[-1], sampler.drafts[:, level : level + 1]))
    shape = DraftShape.chain(gamma, batch_size=MANY, device=torch.device("cpu"))
    draft = Draft(torch.cat(tokens, 1), shape, torch.cat(logits, 1))
    return draft, Verification(rows[draft.tokens], None)


def judged(verification, draft, policy, sampler=None):
    """Acceptance and statistics by the policy, of every sequence."""
    state = DecodeState(
        batch_size=len(draft.tokens),
        max_new_tokens=1,
        num_slots=draft.tokens.shape[1],
        rules=ops.Rules.of([policy] * len(draft.tokens), (), torch.device("cpu")),
        regret_dtype=torch.float32,
        sampler=sampler,
    )
    return accept(verification, draft, state, Needs.of([policy]))[:2]


@pytest.fixture
def rows():
    """(target `[V, V]`, draft `[V, V - 1]`): a row for every token; some tokens are impossible."""
    target, draft = torch.randn(V, V) * 1.5, torch.randn(V, V - 1)
    target[2, 4] = target[3, :3] = -math.inf
    draft += target[:, :-1].clamp(min=-3) * 0.7
    return target, draft


def test_a_chain_of_samples(rows):
    sampler = a_sampler(MANY, 4)
    draft, verification = sampled_chain(*rows, sampler, 3)
    acceptance, stats = judged(verification, draft, STRICT, sampler)
    fit = fit_of_rows(emitted_pairs(draft, acceptance), rows[0])
    assert fit.is_good, (fit.statistic, fit.bound)
    greedy, _ = judged(verification, draft, STRICT)
    kept, by_chance = (found.num_accepted.float().mean() for found in (acceptance, greedy))
    assert kept > 1.2 * by_chance, "samples of the target meet those of the draft"


def _without_residual(logits, draft_logits, tokens, num_slots, tests, draws):
    """Wrong: what follows a rejected token is drawn from the target's whole distribution."""
    right = draw_coupled(logits, draft_logits, tokens, num_slots, tests, draws)
    drafted = tokens.roll(-1, 1)
    return torch.where(right == drafted, right, draw(logits, draws))


def _with_the_same_uniforms(logits, draft_logits, tokens, num_slots, tests, draws):
    """Wrong: a token that was rejected by a uniform is replaced by the same uniform."""
    return draw_coupled(logits, draft_logits, tokens, num_slots, draws, draws)


def _of_a_greedy_draft(logits, draft_logits, tokens, num_slots, tests, draws):
    """Wrong: the draft is taken for less sure of its tokens than it was."""
    return draw_coupled(logits, draft_logits * 0.8, tokens, num_slots, tests, draws)


@pytest.mark.parametrize("rule", [_without_residual, _with_the_same_uniforms, _of_a_greedy_draft])
@pytest.mark.skipif(INTERPRETED, reason="too few samples to tell in the interpreter")
def test_wrong_rules_are_told_from_the_right_one(rows, rule, monkeypatch):
    monkeypatch.setattr(lvspec.phases.accept, "draw_coupled", rule)
    sampler = a_sampler(MANY, 4)
    draft, verification = sampled_chain(*rows, sampler, 3)
    acceptance, _ = judged(verification, draft, STRICT, sampler)
    assert not fit_of_rows(emitted_pairs(draft, acceptance), rows[0]).is_good


@pytest.mark.parametrize("parents", [(-1, 0, 1, 2), (-1, 0, 0, 1, 1, 3), (-1, 0, 0, 0)])
def test_a_tree_that_was_not_sampled(rows, parents):
    """Children are the tokens behind their parent's; which, is a function of the parent's token."""
    shape = torch.tensor([parents] * MANY, dtype=torch.int32)
    slots = len(parents)
    tokens = torch.randint(V, (MANY, slots))
    for slot in range(1, slots):
        tokens[:, slot] = (tokens[:, parents[slot]] + slot + 1) % V
    count = torch.full((MANY,), slots, dtype=torch.int32)
    count[::3] -= 1  # ragged
    draft_shape = DraftShape(
        shape, tree.ancestors_from_parents(shape), tree.depths(shape), count, is_chain=False
    )
    draft = Draft(tokens, draft_shape)
    verification, sampler = Verification(rows[0][tokens], None), a_sampler(MANY, slots)
    acceptance, _ = judged(verification, draft, STRICT, sampler)
    fit = fit_of_rows(emitted_pairs(draft, acceptance), rows[0])
    assert fit.is_good, (fit.statistic, fit.bound)
    assert acceptance.num_accepted.float().mean() > 0.1
    greedy, _ = judged(verification, draft, STRICT)
    assert not fit_of_rows(emitted_pairs(draft, greedy), rows[0]).is_good


def test_padding_of_a_sampled_chain(rows):
    """Behind the last slot in use the target samples as if nothing were drafted there."""
    sampler = a_sampler(MANY, 4)
    draft, verification = sampled_chain(*rows, sampler, 3)
    count = torch.arange(MANY, dtype=torch.int32) % 4 + 1
    shape = replace(draft.shape, num_slots=count)
    tokens = draft.tokens.masked_fill(torch.arange(4) >= count[:, None], 1)  # not drawn
    draft = Draft(tokens, shape, draft.logits)
    verification = Verification(rows[0][tokens], None)
    acceptance, _ = judged(verification, draft, STRICT, sampler)
    assert (acceptance.num_accepted < count).all()
    fit = fit_of_rows(emitted_pairs(draft, acceptance), rows[0])
    assert fit.is_good, (fit.statistic, fit.bound)


# Loose rules on sampled rows.


def _one(logits, tokens, policy, wanted, monkeypatch):
    """Acceptance and statistics of one chain whose samples are `wanted`."""
    monkeypatch.setattr(lvspec.phases.accept, "draw", lambda *_: torch.tensor([wanted]))
    shape = DraftShape.chain(len(tokens) - 1, batch_size=1, device=torch.device("cpu"))
    draft = Draft(torch.tensor([tokens]), shape)
    verification = Verification(torch.tensor([logits]), None)
    sampler = a_sampler(1, len(tokens))
    return judged(verification, draft, policy, sampler)


@pytest.mark.parametrize(
    ("wanted", "token", "top_k", "kind"),
    [
        (3, 3, 2, "exact"),
        (0, 1, 2, "loose"),  # the sample is the best: the other of the two best
        (1, 0, 2, "loose"),  # the best itself, where another was sampled
        (1, 2, 2, None),  # the sample and the best: the third is not among them
        (3, 0, 2, "loose"),  # the sample is none of the two best: it and the best
        (3, 1, 2, None),
        (3, 1, 3, "loose"),
        (3, 2, 3, None),
        (3, 2, 4, "loose"),
        (2, 0, 1, None),  # one token is the sample alone
    ],
)
def test_ranks_count_the_sample_first(wanted, token, top_k, kind, monkeypatch):
    policy = AcceptancePolicy(anchor_threshold=math.inf, top_k=top_k)
    row = [4.0, 3.0, 2.0, 1.0, 0.0]
    acceptance, stats = _one([row, row], [4, token], policy, [wanted, 2], monkeypatch)
    assert stats.top_ids[0, :, 0].tolist() == [wanted, 2]
    assert acceptance.num_accepted.tolist() == [int(kind is not None)]
    assert acceptance.bonus_id.tolist() == [wanted if kind is None else 2]
    if kind is not None:
        assert acceptance.kind[0, 1] == {"exact": 0, "loose": 1}[kind]
        regret = 4.0 - row[token] if kind == "loose" else 0.0
        assert acceptance.regret.tolist() == [regret], "against the best of the row"


def test_an_entropy_gate_is_the_rows(monkeypatch):
    """It looks at the largest probabilities, whatever was sampled."""
    policy = AcceptancePolicy(anchor_threshold=math.inf, min_entropy=0.5)
    flat, sure = [1.0, 1.0, 1.0, 0.0], [9.0, 1.0, 1.0, 0.0]
    for row, count in ((flat, 1), (sure, 0)):
        acceptance, _ = _one([row, row], [0, 1], policy, [3, 3], monkeypatch)
        assert acceptance.num_accepted.tolist() == [count]


def test_guarded_samples(monkeypatch):
    policy = AcceptancePolicy(anchor_threshold=math.inf, top_k=4, strict_ids=(3,))
    row = [4.0, 3.0, 2.0, 1.0]
    for wanted, count in ((3, 0), (1, 1)):
        acceptance, _ = _one([row, row], [0, 2], policy, [wanted, 0], monkeypatch)
        assert acceptance.num_accepted.tolist() == [count]


# The uniforms.


def test_splitmix64():
    """The first numbers of the published generator with seed 0."""
    first, second = (sampling._mix(torch.tensor(count) * sampling._STEP) for count in (1, 2))
    assert int(first) % 2**64 == 0xE220A8397B1DCDAF
    assert int(second) % 2**64 == 0x6E789E6AA1B965F4


def test_uniforms_are_uniform_and_differ():
    sampler = a_sampler(200, 13)
    columns = []
    for _ in range(10):
        columns += [sampler.drafts, sampler.tests, sampler.draws]
        sampler.advance()
    found = torch.cat(columns, 1)
    assert found.dtype == torch.float32 and 0 <= found.min() and found.max() < 1
    assert len(found.unique()) > 0.99 * found.numel()
    fit = Fit()
    fit.add(torch.histc(found, 64, 0, 1), torch.full((64,), 1 / 64))
    both = (found[:, :-1] * 8).long() * 8 + (found[:, 1:] * 8).long()  # neighbours in a sequence
    fit.add(both.flatten().bincount(minlength=64), torch.full((64,), 1 / 64))
    both = (found[:-1] * 8).long() * 8 + (found[1:] * 8).long()  # neighbours in a batch
    fit.add(both.flatten().bincount(minlength=64), torch.full((64,), 1 / 64))
    assert fit.is_good, (fit.statistic, fit.bound)


# End to end.


@pytest.fixture(scope="module")
def small_models():
    """A target that knows twelve words, a draft that is like it, and one that is less so."""
    config = target_config()
    config.text_config.vocab_size = 12
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = ["full_attention"]
    torch.manual_seed(3)
    target = Qwen2_5_VLForConditionalGeneration(config).eval().double()
    for parameter in target.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.07)
    target.generation_config.eos_token_id = None
    drafts = []
    for noise in (0.05, 0.2):
        drafts.append(copy.deepcopy(target))
        with torch.no_grad():
            for parameter in drafts[-1].parameters():
                parameter.add_(torch.randn_like(parameter), alpha=noise)
    return target, *drafts


PROMPT = {"input_ids": torch.tensor([[7, 9, 8, 11]])}
SAMPLING = {"temperature": 1.2, "top_k": 4, "top_p": 0.95}


@pytest.fixture(scope="module")
def exact(small_models):
    """The target's distribution over the next three tokens, `[12, 12, 12]`, by HF's forward."""
    warpers = logits_process.LogitsProcessorList(
        [
            logits_process.TemperatureLogitsWarper(1.2),
            logits_process.TopKLogitsWarper(4),
            logits_process.TopPLogitsWarper(0.95),
        ]
    )

    def following(words):
        prompt = PROMPT["input_ids"].expand(len(words), -1)
        ids = torch.cat([prompt, words], 1)
        with torch.no_grad():
            logits = small_models[0](input_ids=ids, use_cache=False).logits[:, -1]
        return warpers(ids, logits).softmax(-1)

    every = torch.arange(12)
    joint = following(torch.zeros(1, 0, dtype=torch.int64))[0]
    joint = joint[:, None] * following(every[:, None])
    return joint[..., None] * following(torch.cartesian_prod(every, every)).view(12, 12, 12)


def _fit_of_samples(target, draft, exact, policy=STRICT, count=400, **config):
    config = DecodeConfig(gamma=3, max_new_tokens=3, eos_ids=(), seed=1, **SAMPLING, **config)
    given = (PROMPT for _ in range(count))
    counts = torch.zeros(12, 12, 12)
    accepted = 0
    for result in generate_many(
        target, draft, given, batch_size=100, policy=policy, config=config, ordered=False
    ):
        counts[tuple(result.tokens[0].tolist())] += 1
        # Of what was verified, also where no more than three tokens were asked for.
        accepted += sum(result.stats.acceptance_by_position) * result.stats.num_iterations
    fits = {}
    for name, others in (("first two", (2,)), ("last two", (0,)), ("all three", ())):
        fits[name] = Fit()
        fits[name].add(
            *(x.sum(others).flatten() if others else x.flatten() for x in (counts, exact))
        )
    return fits, accepted / count


@pytest.mark.slow
@pytest.mark.parametrize("method", ["chain", "few words", "tree", "alone"])
def test_end_to_end(small_models, exact, method, draft_trees):
    target, draft, _ = small_models
    if method == "tree":
        best = exact.sum(2) / exact.sum((1, 2)).clamp(min=1e-9)[:, None]  # by the token before
        ranked = best.argsort(-1, descending=True)

        def guess(state):
            last = state.last_two[:, 1]
            first, second = ranked[last, 0], ranked[last, 1]
            third = ranked[first, 0]
            return torch.stack([first, second, third, ranked[first, 1], ranked[third, 0]], 1)

        draft_trees(guess)
    options = {}
    if method == "few words":  # half of what the target says
        options["draft_vocab"] = exact.sum((1, 2)).argsort(descending=True)[:4:2].tolist()
    draft = draft if method in ("chain", "few words") else None
    fits, accepted = _fit_of_samples(target, draft, exact, **options)
    for name, fit in fits.items():
        assert fit.freedom >= 10
        assert fit.is_good, (name, fit.statistic, fit.bound)
    assert (accepted > 0.3) == (method != "alone")


@pytest.mark.slow
def test_loose_is_not_the_targets_distribution(small_models, exact):
    """What the test above can tell: the same with loose rules is refused."""
    policy = AcceptancePolicy(anchor_threshold=math.inf)
    fits, _ = _fit_of_samples(small_models[0], small_models[2], exact, policy=policy)
    assert not any(fit.is_good for fit in fits.values())


@pytest.fixture(scope="module")
def pair(random_pair, noisy_draft):
    return tuple(copy.deepcopy(model).double() for model in (random_pair[0], noisy_draft))


@pytest.fixture(scope="module")
def prompts(make_prompt):
    parts = [(3, ("video", 4, 6, 6), 5), (9,), (2, ("image", 4, 8), 4), (30,)]
    found = [make_prompt(*each, seed=index) for index, each in enumerate(parts)]
    return [
        {name: x.double() if x.is_floating_point() else x for name, x in prompt.items()}
        for prompt in found
    ]


def _config(**config):
    defaults = {"gamma": 4, "max_new_tokens": 24, "eos_ids": (), "temperature": 0.8, "seed": 7}
    return DecodeConfig(**{**defaults, **config})


POLICIES = [STRICT, gated(0.12)]


@pytest.mark.parametrize("policy", POLICIES, ids=["strict", "loose"])
@pytest.mark.parametrize("with_draft", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_batch_gives_what_each_gives_alone(pair, prompts, policy, with_draft):
    draft = pair[1] if with_draft else None
    arguments = {"policy": policy, "config": _config()}
    together = generate(pair[0], draft, prompts, **arguments)
    alone = generate_many(pair[0], draft, prompts, batch_size=1, **arguments)
    two = generate_many(pair[0], draft, prompts, batch_size=2, ordered=False, **arguments)
    two = {result.index: result for result in two}
    for index, single in enumerate(alone):
        assert single.tokens.equal(together[index].tokens)
        assert single.tokens.equal(two[index].tokens)
        assert single.kinds.equal(together[index].kinds)
    assert not together[0].tokens.equal(generate(pair[0], None, prompts[0]).tokens), "greedy"


def test_seeds(pair, prompts):
    def tokens(**config):
        return generate(*pair, prompts[0], policy=STRICT, config=_config(**config)).tokens.tolist()

    assert tokens() == tokens()
    assert tokens() != tokens(seed=8)
    torch.manual_seed(1)
    first, second = tokens(seed=None), tokens(seed=None)
    assert first != second
    torch.manual_seed(1)
    assert tokens(seed=None) == first
    same = generate(pair[0], None, [prompts[1]] * 2, config=_config())
    assert not same[0].tokens.equal(same[1].tokens), "of one prompt twice, two samples"


@pytest.mark.parametrize("with_draft", [True, False])
def test_ends(pair, prompts, with_draft):
    """An end of sequence or a length cuts off what would have followed, and changes nothing else"""
    draft = pair[1] if with_draft else None

    def tokens(**config):
        return generate(pair[0], draft, prompts[0], policy=STRICT, config=_config(**config)).tokens

    whole = tokens()[0].tolist()
    for place in range(2, 10):
        ends = (whole[place], whole[place + 5])
        stop = min(whole.index(end) for end in ends) + 1
        assert tokens(eos_ids=ends)[0].tolist() == whole[:stop]
    assert tokens(max_new_tokens=5)[0].tolist() == whole[:5]


@pytest.mark.parametrize("policy", POLICIES, ids=["strict", "loose"])
def test_nothing_outside_top_k_and_top_p(pair, prompts, policy, hf_rows):
    """Nor is the draft's: every token is one that the warped row allows; regret is the rows'."""
    config = _config(top_k=6, top_p=0.8, max_new_tokens=40)
    result = generate(*pair, prompts[0], policy=policy, config=config)
    tokens = result.tokens[0].tolist()
    rows, _ = hf_rows(pair[0], prompts[0], tokens)
    rows = logits_process.TemperatureLogitsWarper(0.8)(None, rows[:-1])
    rows = logits_process.TopKLogitsWarper(6)(None, rows)
    rows = logits_process.TopPLogitsWarper(0.8)(None, rows)
    own = rows.gather(1, result.tokens.T)[:, 0]
    assert own.isfinite().all()
    is_mismatch = (result.kinds[0] == 1) | (result.kinds[0] == 2)
    assert bool(is_mismatch.any()) == (policy is not STRICT)
    lost = (rows.amax(-1) - own)[is_mismatch].sum()
    assert result.stats.regret == pytest.approx(float(lost), abs=1e-6)


def test_nearly_greedy(pair, prompts, hf_greedy):
    """Towards a temperature of 0 a sample is the best token, the draft's as well."""
    config = _config(temperature=1e-6)
    result = generate(*pair, prompts[0], policy=STRICT, config=config)
    assert result.tokens[0].tolist() == hf_greedy(pair[0], prompts[0], 24)
    greedy = generate(*pair, prompts[0], policy=STRICT, config=_config(temperature=0.0))
    assert result.stats.num_accepted == greedy.stats.num_accepted


def test_trace_of_samples(pair, prompts):
    result = generate(*pair, prompts[0], policy=STRICT, config=_config(trace=True))
    tokens = result.tokens[0].tolist()
    for step in result.trace.steps():
        said = step.drafted[: step.num_accepted] + [step.wanted[step.num_accepted]]
        assert step.wanted[: step.num_accepted] == step.drafted[: step.num_accepted]
        there = tokens[step.position : step.position + len(said)]
        assert there == said[: len(there)]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "temperature: expected a finite number >= 0, got -0.1"),
        ({"temperature": math.inf}, ValueError, "temperature: expected a finite number"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a finite number"),
        ({"temperature": "1"}, TypeError, "temperature: expected a number, got '1'"),
        ({"temperature": 1, "top_k": 0}, ValueError, "top_k: expected an integer >= 1, got 0"),
        ({"temperature": 1, "top_p": 0.0}, ValueError, r"top_p: expected a probability in \(0, 1"),
        ({"temperature": 1, "seed": 1.5}, TypeError, "seed: expected an integer, got 1.5"),
        ({"temperature": 1, "seed": -1}, ValueError, "seed: expected an integer from 0"),
        ({"top_p": 0.5}, ValueError, "top_p: expected None with temperature=0"),
    ],
)
def test_config(config, error, message):
    with pytest.raises(error, match=f"^{message}"):
        DecodeConfig(**config)
