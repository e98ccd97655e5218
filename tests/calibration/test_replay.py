"""Replay: a walk through recorded rows is what a run does, token for token."""

import copy
import math

import pytest
import torch
from policies import gated

from lvspec import AcceptancePolicy, DecodeConfig, generate
from lvspec.calibration.candidates import OWN
from lvspec.calibration.contexts import Contexts, contexts_of
from lvspec.calibration.replay import replay

GATED = 0.12  # about the median relevance of the random target
POLICIES = {
    "strict": AcceptancePolicy.strict(),
    "no gate": gated(math.inf, max_regret=3.0, shift_window=0),
    "gate": gated(GATED, shift_window=0),
    "own gate": gated("auto", shift_window=0),
    "shifts": gated(GATED, shift_window=3),
    "budget": gated(math.inf, regret_budget=2.0, regret_rate=0.1),
    "guarded": gated(math.inf, strict_ids=tuple(range(0, 200, 2))),
    "typical": AcceptancePolicy.typical(),
    "fly": AcceptancePolicy.fly(window=1, min_entropy=0.01),
}
COUNT = 24


@pytest.fixture(scope="module")
def prompts(make_prompt):
    return [
        make_prompt(3, ("video", 4, 6, 6), 4 + seed, seed=seed, dtype=torch.float64)
        for seed in range(2)
    ]


def two_kinds(output):
    """A scorer: rows that look at the video and rows that do not, by the token that they want."""
    return torch.where(output.logits.argmax(-1) % 3 == 0, 0.5, 0.01).float()


def captions(pair, prompts, policy, gamma, eos_ids=()):
    given = {"scorer": two_kinds} if policy.is_calibrating else {}
    config = DecodeConfig(gamma=gamma, max_new_tokens=COUNT, eos_ids=eos_ids, trace=True, **given)
    return [generate(*pair, inputs, policy=policy, config=config) for inputs in prompts]


def recorded(*runs):
    return [contexts_of([g.to_dict() for g in clip]) for clip in zip(*runs, strict=True)]


def check(walks, generations):
    for walk, generation in zip(walks, generations, strict=True):
        assert walk.tokens == generation.tokens[0].tolist()
        assert walk.iterations == generation.stats.num_iterations
        # Of the whole last pass, where a run counts what is output.
        assert walk.regret >= generation.stats.regret - 1e-3
        assert walk.num_emitted == generation.stats.num_emitted


@pytest.mark.parametrize("name", POLICIES)
def test_a_walk_over_its_own_rows_is_the_run(pair, prompts, name):
    policy = POLICIES[name]
    runs = captions(pair, prompts, policy, 6)
    walks = replay(recorded(runs), policy, 6, eos_ids=(), max_new_tokens=COUNT)
    check(walks, runs)
    assert not any(walk.guessed for walk in walks)
    if name in ("no gate", "own gate", "shifts"):
        assert sum(walk.mismatches for walk in walks) > 0


def test_shorter_chains_are_in_longer_ones(pair, prompts):
    """A strict run by 12 has every context of a strict run by 3, up to where its chains end."""
    long = captions(pair, prompts, OWN, 12)
    short = captions(pair, prompts, AcceptancePolicy.strict(), 3)
    walks = replay(recorded(long), AcceptancePolicy.strict(), 3, eos_ids=(), max_new_tokens=COUNT)
    for walk, generation in zip(walks, short, strict=True):
        assert walk.tokens == generation.tokens[0].tolist()
    assert sum(walk.guessed for walk in walks) < sum(walk.iterations for walk in walks) / 4


def test_more_rows_leave_less_to_guess(pair, prompts):
    """Where a policy leaves what a strict run said, rows of a loose run are its own."""
    policy, own = POLICIES["no gate"], captions(pair, prompts, OWN, 6)
    loose = captions(pair, prompts, policy, 6)
    options = {"eos_ids": (), "max_new_tokens": COUNT}
    guessed = replay(recorded(own), policy, 6, **options)
    known = replay(recorded(own, loose), policy, 6, **options)
    check(known, loose)
    assert sum(walk.guessed for walk in known) == 0 < sum(walk.guessed for walk in guessed)


def test_an_end_of_sequence_ends_a_walk(pair, prompts):
    first = captions(pair, prompts[:1], OWN, 6)
    eos_ids = (first[0].tokens[0, 9].item(),)
    runs = captions(pair, prompts, OWN, 6, eos_ids)
    walks = replay(recorded(runs), OWN, 6, eos_ids=eos_ids, max_new_tokens=COUNT)
    for walk, generation in zip(walks, runs, strict=True):
        assert walk.tokens == generation.tokens[0].tolist()
        assert walk.iterations == generation.stats.num_iterations
    assert any(len(walk.tokens) < COUNT for walk in walks)


def test_a_draft_that_stops_at_an_end_leaves_nothing_to_guess(pair, prompts):
    """Behind the end of sequence that it drafted there is a row of the target and no proposal."""
    same = pair[0], copy.deepcopy(pair[0])  # whose drafts are right, the end among them
    (first,) = captions(same, prompts[:1], OWN, 6)
    tokens = first.tokens[0].tolist()
    # One that was not said before, and stands within a chain of six: the seventh is the bonus.
    eos_ids = next((tokens[i],) for i in (9, 10, 11, 3, 4) if tokens[i] not in tokens[:i])
    runs = captions(same, prompts[:1], OWN, 6, eos_ids)
    last = runs[0].trace.steps()[-1]
    assert last.drafted[-1] == eos_ids[0] and len(last.drafted) < 6, "it stopped"
    walks = replay(recorded(runs), OWN, 6, eos_ids=eos_ids, max_new_tokens=COUNT)
    check(walks, runs)
    assert walks[0].guessed == 0


def test_what_a_trace_does_not_keep_is_named(pair, prompts):
    policy = AcceptancePolicy(anchor_threshold=0.5, top_k=6)
    with pytest.raises(ValueError, match="top_k, entropy_top: expected at most 5"):
        replay([], policy, 6, eos_ids=(), max_new_tokens=COUNT)


def test_the_most_alike_context_stands_in(pair, prompts):
    (caption,) = captions(pair, prompts[:1], OWN, 6)
    tokens = caption.tokens[0].tolist()
    contexts = contexts_of([caption.to_dict()])
    assert list(contexts.nearest(tokens[:20]).backwards())[::-1][-8:] == tokens[12:20]
    # A word of the vocabulary that was never said has nothing in common with anything.
    strange = contexts.nearest([*tokens[:20], 10**6])
    assert abs(strange.length - 21) <= 6
    assert Contexts([]).nearest(tokens) is None


def test_chance_is_no_matter_of_rows(pair, prompts):
    with pytest.raises(ValueError, match="random_share: expected none"):
        replay([], AcceptancePolicy.random_relaxation(), 6, eos_ids=(), max_new_tokens=COUNT)
