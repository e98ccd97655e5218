"""N-grams that draft for the draft: the chain is the draft's own, in fewer of its passes."""

import copy

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig, generate, generate_many
from lvspec.models.model import Model
from lvspec.phases.draft import NGramChainDrafter

STRICT = AcceptancePolicy.strict()
NO_GATE = AcceptancePolicy(anchor_threshold=float("inf"), top_k=3)


@pytest.fixture(scope="module")
def prompts(make_prompt):
    """Prompts that repeat themselves, so that look-ups find something; different lengths."""
    found = []
    for seed, parts in enumerate([(3, ("video", 2, 6, 6), 30), (40,), (2, ("image", 4, 8), 24)]):
        inputs = make_prompt(*parts, seed=seed)
        ids = inputs["input_ids"]
        ids[0, -12:] = ids[0, -13:-12] if seed == 1 else ids[0, -24:-12].clone()
        found.append({k: x.double() if x.is_floating_point() else x for k, x in inputs.items()})
    return found


@pytest.fixture
def passes(monkeypatch):
    """Counts the draft's passes: `passes.count`."""

    class Counter:
        count = 0

    plain = Model.step

    def step(self, *arguments, **options):
        Counter.count += self.role == "draft"
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Model, "step", step)
    return Counter


def _config(**config):
    return DecodeConfig(**{"gamma": 6, "max_new_tokens": 30, "eos_ids": (), **config})


@pytest.mark.parametrize(
    "policy, lookup",
    [
        (STRICT, 1),
        (NO_GATE, 3),
        (NO_GATE, 9),
        pytest.param(NO_GATE, 1, marks=pytest.mark.slow),
        pytest.param(STRICT, 3, marks=pytest.mark.slow),
        pytest.param(STRICT, 9, marks=pytest.mark.slow),
    ],
)
def test_the_chain_is_the_drafts_own(pair, prompts, policy, lookup):
    """On a CPU every chain is whole: the same drafts, token by token, as without look-ups."""
    for inputs in prompts:
        plain, ours = (
            generate(*pair, inputs, policy=policy, config=_config(trace=True, draft_ngram=n))
            for n in (0, lookup)
        )
        assert ours.tokens.equal(plain.tokens)
        assert ours.kinds.equal(plain.kinds)
        mine, wanted = ours.trace.steps(), plain.trace.steps()
        assert [step.drafted for step in mine] == [step.drafted for step in wanted]


def test_fewer_passes_where_something_repeats(pair, prompts, passes):
    """A target that drafts for itself in a loop of few tokens."""
    target = copy.deepcopy(pair[0])
    with torch.no_grad():  # the last token decides the next one, so that the output is periodic
        for layer in target.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
    # Five whole chains behind the first token.
    config = {"max_new_tokens": 66, "gamma": 12}
    plain = generate(target, target, prompts[1], policy=STRICT, config=_config(**config))
    before, passes.count = passes.count, 0
    config |= {"draft_ngram": 4}
    ours = generate(target, target, prompts[1], policy=STRICT, config=_config(**config))
    assert ours.tokens.equal(plain.tokens)
    assert ours.stats.tau == plain.stats.tau == 13
    assert before == 12 * plain.stats.num_iterations, "a pass a token"
    assert passes.count < before / 2


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_number_of_passes(pair, prompts, count):
    """Chains of different lengths, from `count` tokens on, and the output is the same."""
    config = _config(draft_ngram=2, draft_passes=count, trace=True)
    alone = [generate(*pair, inputs, policy=STRICT, config=config) for inputs in prompts]
    for inputs, ours in zip(prompts, alone, strict=True):
        plain = generate(pair[0], None, inputs, policy=STRICT, config=_config())
        assert ours.tokens.equal(plain.tokens)
        lengths = {len(step.drafted) for step in ours.trace.steps()}
        assert min(lengths) >= count and max(lengths) <= min(6, 3 * count)
    together = generate(*pair, prompts, policy=STRICT, config=config)
    for ours, wanted in zip(together, alone, strict=True):
        assert ours.tokens.equal(wanted.tokens)
        assert ours.stats.num_accepted == wanted.stats.num_accepted


def test_places_taken_again(pair, prompts):
    config = _config(draft_ngram=3)
    order = [0, 1, 2, 1, 0, 2]
    results = generate_many(
        *pair, (prompts[i] for i in order), batch_size=2, policy=STRICT, config=config
    )
    for index, result in zip(order, results, strict=True):
        wanted = generate(pair[0], None, prompts[index], config=_config())
        assert result.tokens.equal(wanted.tokens)


@pytest.mark.parametrize(
    "options", [pytest.param({"draft_keep": 0.3}, marks=pytest.mark.slow), {"draft": "self"}]
)
def test_with_other_ways_to_draft(pair, prompts, options):
    draft = options.get("draft", pair[1])
    config = _config(draft_ngram=3, draft_keep=options.get("draft_keep", 1.0))
    for inputs in prompts:
        ours = generate(pair[0], draft, inputs, policy=STRICT, config=config)
        assert ours.tokens.equal(generate(pair[0], None, inputs, config=_config()).tokens)


def test_nothing_is_read_where_that_would_stop_a_gpu(pair, prompts, monkeypatch):
    """All passes are run where the drafter may not look."""
    plain = NGramChainDrafter.__init__

    def blind(self, *arguments, **options):
        plain(self, *arguments, **options)
        self._may_look = False

    config = _config(draft_ngram=2)
    wanted = generate(*pair, prompts[0], policy=STRICT, config=config)
    monkeypatch.setattr(NGramChainDrafter, "__init__", blind)
    ours = generate(*pair, prompts[0], policy=STRICT, config=config)
    assert ours.tokens.equal(wanted.tokens)
    assert ours.stats.num_accepted == wanted.stats.num_accepted


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"draft_ngram": -1}, ValueError, "draft_ngram: expected an integer from 1 to 62, got -1"),
        ({"draft_ngram": 2.0}, TypeError, "draft_ngram: expected an integer"),
        ({"draft_ngram": 2, "draft_passes": 13}, ValueError, "draft_passes: .* from 1 to 12"),
        ({"draft_ngram": 2, "stop_at_unsure_anchors": 0.5}, ValueError, "^stop_at.*expected none"),
        ({"draft_ngram": 2, "tree": "specvlm"}, ValueError, "draft_ngram: expected a chain"),
    ],
)
def test_options_that_do_not_go(options, error, message):
    with pytest.raises(error, match=message):
        DecodeConfig(**options)
