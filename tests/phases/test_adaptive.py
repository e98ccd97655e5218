"""Chains that end early: the same tokens under strict, and ends where the rules say.

In float64, where rows of different passes do not differ by enough to change a token.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from recorded import RECORDED

from lvspec import AcceptancePolicy, DecodeConfig, generate
from lvspec.engine.api import generate_many
from lvspec.models.inputs import check_inputs
from lvspec.models.model import Model
from lvspec.phases.draft.adaptive import AdaptiveChainDrafter
from lvspec.phases.draft.factory import make_drafter

THRESHOLD, CONFIDENCE = 0.05, 0.15
OPTIONS = {
    "adaptive": {"adaptive": True, "cost_ratio": 0.2},
    "anchors": {"stop_at_unsure_anchors": CONFIDENCE},
    "both": {"adaptive": True, "cost_ratio": 0.2, "stop_at_unsure_anchors": CONFIDENCE},
}
EACH = ["adaptive", "anchors", pytest.param("both", marks=pytest.mark.slow)]
STRICT = AcceptancePolicy.strict()
LOOSE = AcceptancePolicy.lvspec(anchor_threshold=0.12, regret_budget=3.0)


@pytest.fixture(scope="module")
def prompts(make_prompt):
    parts = [(3, ("video", 4, 6, 6), 5), (9,), (1, ("video", 2, 4, 14), 7), (2, ("image", 4, 8), 4)]
    return [make_prompt(*each, seed=index, dtype=torch.float64) for index, each in enumerate(parts)]


def _config(option, **config):
    config = {"gamma": 6, "max_new_tokens": 40, "eos_ids": (), "trace": True, **config}
    config.setdefault("capture", RECORDED)
    options = OPTIONS.get(option, {})
    return DecodeConfig(draft_anchor_threshold=THRESHOLD, **{**config, **options})


def _drafted(generation):
    return [len(step.drafted) for step in generation.trace.steps()]


def _drafter(pair, **config):
    target, draft = (Model(model, "model") for model in pair)
    drafter = make_drafter(target, draft, _config("adaptive", **config))
    drafter.allocate(batch_size=3, capacity=100)
    return drafter


@pytest.mark.parametrize("option", EACH)
def test_strict_is_greedy(pair, prompts, option, hf_greedy):
    sizes = set()
    found = generate(*pair, prompts, policy=STRICT, config=_config(option))
    for prompt, generation in zip(prompts, found, strict=True):
        assert generation.tokens[0].tolist() == hf_greedy(pair[0], prompt, 40)
        drafted = _drafted(generation)
        assert generation.stats.num_drafted == sum(drafted)
        sizes.update(drafted)
    assert len(sizes) > 2, "chains of different lengths"


@pytest.mark.parametrize("policy", [pytest.param(STRICT, marks=pytest.mark.slow), LOOSE])
@pytest.mark.parametrize("option", EACH)
def test_each_of_a_batch_as_alone(pair, prompts, option, policy):
    """Places are taken again, and what is known of a sequence goes with it."""
    config = _config(option)
    alone = [generate(*pair, prompt, policy=policy, config=config) for prompt in prompts]
    for found in (
        generate(*pair, prompts, policy=policy, config=config),
        generate_many(*pair, prompts, batch_size=2, policy=policy, config=config),
    ):
        for ours, theirs in zip(found, alone, strict=True):
            assert ours.tokens.equal(theirs.tokens)
            assert ours.kinds.equal(theirs.kinds)
            assert _drafted(ours) == _drafted(theirs)


@pytest.mark.parametrize("option", EACH)
def test_all_passes_give_the_same(pair, prompts, option, monkeypatch):
    """On a GPU no pass is left out, for to know would stop it."""
    config = _config(option, capture=False)
    stopped = generate(*pair, prompts, policy=LOOSE, config=config)
    passes = []
    step = Model.step

    def counted(self, *args, **kwargs):
        passes.append(self.role)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Model, "step", counted)
    generate(*pair, prompts, policy=LOOSE, config=config)
    few = passes.count("draft")
    passes.clear()
    make = AdaptiveChainDrafter.__init__

    def on_gpu(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self._may_look = False

    monkeypatch.setattr(AdaptiveChainDrafter, "__init__", on_gpu)
    complete = generate(*pair, prompts, policy=LOOSE, config=config)
    assert passes.count("draft") == 6 * passes.count("target") > few
    for ours, theirs in zip(stopped, complete, strict=True):
        assert ours.tokens.equal(theirs.tokens)
        assert _drafted(ours) == _drafted(theirs)


def test_ends_before_the_first_unsure_anchor(pair, prompts, hf_rows):
    """By the draft's own rows, from HF with eager attention."""
    seen = set()
    for prompt in prompts:
        generation = generate(*pair, prompt, policy=STRICT, config=_config("anchors"))
        tokens = generation.tokens[0].tolist()
        for step in generation.trace.steps():
            begun = tokens[: step.position] + step.drafted
            logits, peaks = hf_rows(pair[1], prompt, begun)
            sure = logits[step.position :].softmax(-1).amax(-1) >= CONFIDENCE
            anchor = peaks[step.position :] >= THRESHOLD
            may_go_on = (sure | ~anchor).tolist()
            assert all(may_go_on[:-1])
            assert not may_go_on[-1] or len(step.drafted) == 6
            assert step.drafted == logits[step.position : -1].argmax(-1).tolist()
            seen.add(len(step.drafted))
    assert {0, 6} < seen


def test_without_anchors_or_doubt_nothing_ends_early(pair, prompts):
    for options in ({"draft_anchor_threshold": math.inf}, {"stop_at_unsure_anchors": 1e-9}):
        config = {"stop_at_unsure_anchors": 1.0, "draft_anchor_threshold": -1.0, **options}
        config = DecodeConfig(gamma=4, max_new_tokens=20, eos_ids=(), trace=True, **config)
        assert set(_drafted(generate(*pair, prompts[0], config=config))) == {4}


@pytest.mark.parametrize("ratio", [1e-6, 0.05, 0.2, 1.0, 50.0])
def test_lengths_are_the_most_worth(pair, ratio):
    """Against the definition, for sequences that accept hardly, half the time and always."""
    drafter = _drafter(pair)
    drafter.cost_ratio = ratio
    chances = [0.05, 0.5, 0.99]
    drafter._counts.copy_(torch.tensor([[10 * chance, 10.0] for chance in chances]))
    for found, chance in zip(drafter.lengths().tolist(), chances, strict=True):
        worth = [sum(chance**j for j in range(g + 1)) / (1 + ratio * g) for g in range(1, 7)]
        assert worth[found - 1] == pytest.approx(max(worth))
    if ratio == 50.0:
        assert drafter.lengths().tolist() == [1, 1, 1]
    if ratio == 1e-6:
        assert drafter.lengths().tolist()[1:] == [6, 6]


@pytest.mark.slow
def test_length_follows_acceptance(pair, prompts):
    """A draft that is always right is used to the full, one that never is hardly at all."""
    target, draft = pair
    config = DecodeConfig(
        gamma=12, max_new_tokens=120, eos_ids=(), trace=True, adaptive=True, cost_ratio=0.1
    )
    own = _drafted(generate(target, target, prompts[0], policy=STRICT, config=config))
    assert own[-1] == 12 and own == sorted(own)
    wrong = copy.deepcopy(draft)
    with torch.no_grad():
        wrong.lm_head.weight.mul_(-1)
    drafted = _drafted(generate(target, wrong, prompts[0], policy=STRICT, config=config))
    assert drafted[0] > 2 and set(drafted[-60:]) == {1}


def test_what_is_counted(pair):
    """Accepted tokens, and with them the first rejected one if there is one."""
    drafter = _drafter(pair)
    drafter._counts.zero_()
    for num_slots, accepted, counts in (
        ([7, 7, 7], [0, 3, 6], [[0, 1], [3, 4], [6, 6]]),
        ([1, 4, 4], [0, 3, 1], [[0, 0.9], [5.7, 6.6], [6.4, 7.4]]),
    ):
        shape = SimpleNamespace(num_slots=torch.tensor(num_slots))
        drafter.commit(
            SimpleNamespace(shape=shape),
            SimpleNamespace(num_accepted=torch.tensor(accepted)),
            torch.zeros(3),
        )
        torch.testing.assert_close(drafter._counts, torch.tensor(counts, dtype=torch.float32))


def test_a_new_sequence_begins_anew(pair, prompts):
    drafter = _drafter(pair)
    drafter._counts.copy_(torch.tensor([[0.1, 9.0]] * 3))
    before = drafter.lengths().tolist()
    inputs = check_inputs(drafter.model, prompts[1])
    drafter.prefill(inputs, 1, prompt=inputs["input_ids"], target_cache=None)
    assert before == [1, 1, 1]
    assert [length > 1 for length in drafter.lengths().tolist()] == [False, True, False]


def test_cost_ratio_by_the_weights(random_pair):
    """Layers, the last norm and the head, in bytes; a table of embeddings is hardly read."""
    target, draft = (Model(model, "model") for model in random_pair)
    config = DecodeConfig(adaptive=True)
    drafter = make_drafter(target, draft, config)

    def weights(model):
        names = ("layers", "norm", "lm_head")
        return sum(
            p.numel() * 4
            for name, p in model.hf.named_parameters(remove_duplicate=False)
            if "visual" not in name and any(part in name for part in names)
        )

    assert drafter.cost_ratio == weights(draft) / weights(target)
    given = make_drafter(target, draft, DecodeConfig(adaptive=True, cost_ratio=0.3))
    assert given.cost_ratio == 0.3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cost_ratio": 0.0}, "cost_ratio: expected a number > 0, got 0.0"),
        ({"cost_ratio": math.nan}, "cost_ratio: expected a number > 0, got nan"),
        ({"stop_at_unsure_anchors": 1.5}, "stop_at_unsure_anchors: expected a probability"),
        ({"stop_at_unsure_anchors": 0.0}, "stop_at_unsure_anchors: expected a probability"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**options)
