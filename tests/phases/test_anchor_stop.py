"""Chains that end before unsure anchors: the same tokens under strict, and ends where it is said.

In float64, where rows of different passes do not differ by enough to change a token.
"""

import math

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig, generate
from lvspec.engine.api import generate_many
from lvspec.models.model import Model
from lvspec.phases.draft.anchor_stop import AnchorStopDrafter

THRESHOLD, CONFIDENCE = 0.05, 0.15
STRICT = AcceptancePolicy.strict()
LOOSE = AcceptancePolicy.lvspec(anchor_threshold=0.12, regret_budget=3.0)


@pytest.fixture(scope="module")
def prompts(make_prompt):
    parts = [(3, ("video", 4, 6, 6), 5), (9,), (1, ("video", 2, 4, 14), 7), (2, ("image", 4, 8), 4)]
    return [make_prompt(*each, seed=index, dtype=torch.float64) for index, each in enumerate(parts)]


def _config(**config):
    config = {"gamma": 6, "max_new_tokens": 40, "eos_ids": (), "trace": True, **config}
    options = {"draft_anchor_threshold": THRESHOLD, "stop_at_unsure_anchors": CONFIDENCE}
    return DecodeConfig(**{**options, **config})


def _drafted(generation):
    return [len(step.drafted) for step in generation.trace.steps()]


def test_strict_is_greedy(pair, prompts, hf_greedy):
    sizes = set()
    found = generate(*pair, prompts, policy=STRICT, config=_config())
    for prompt, generation in zip(prompts, found, strict=True):
        assert generation.tokens[0].tolist() == hf_greedy(pair[0], prompt, 40)
        drafted = _drafted(generation)
        assert generation.stats.num_drafted == sum(drafted)
        sizes.update(drafted)
    assert len(sizes) > 2, "chains of different lengths"


@pytest.mark.parametrize("policy", [pytest.param(STRICT, marks=pytest.mark.slow), LOOSE])
def test_each_of_a_batch_as_alone(pair, prompts, policy):
    """Places are taken again."""
    config = _config()
    alone = [generate(*pair, prompt, policy=policy, config=config) for prompt in prompts]
    for found in (
        generate(*pair, prompts, policy=policy, config=config),
        generate_many(*pair, prompts, batch_size=2, policy=policy, config=config),
    ):
        for ours, theirs in zip(found, alone, strict=True):
            assert ours.tokens.equal(theirs.tokens)
            assert ours.kinds.equal(theirs.kinds)
            assert _drafted(ours) == _drafted(theirs)


@pytest.mark.slow
def test_all_passes_give_the_same(pair, prompts, monkeypatch):
    """On a GPU no pass is left out, for to know would stop it."""
    config = _config(capture=False)
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
    make = AnchorStopDrafter.__init__

    def on_gpu(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self._may_look = False

    monkeypatch.setattr(AnchorStopDrafter, "__init__", on_gpu)
    complete = generate(*pair, prompts, policy=LOOSE, config=config)
    assert passes.count("draft") == 6 * passes.count("target") > few
    for ours, theirs in zip(stopped, complete, strict=True):
        assert ours.tokens.equal(theirs.tokens)
        assert _drafted(ours) == _drafted(theirs)


def test_ends_before_the_first_unsure_anchor(pair, prompts, hf_rows):
    """By the draft's own rows, from HF with eager attention."""
    seen = set()
    for prompt in prompts:
        generation = generate(*pair, prompt, policy=STRICT, config=_config())
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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stop_at_unsure_anchors": 1.5}, "stop_at_unsure_anchors: expected a probability"),
        ({"stop_at_unsure_anchors": 0.0}, "stop_at_unsure_anchors: expected a probability"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**options)
