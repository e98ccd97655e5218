"""Batches: every sequence gets what it gets alone, whoever its neighbours are and when it comes.

In float64, where rows of different passes do not differ by enough to change a token.
"""

import copy
import random

import pytest
import torch
from policies import gated

from lvspec import AcceptancePolicy, DecodeConfig, GenerationInterrupted, NonFiniteLogits
from lvspec.engine.api import generate, generate_many

POLICIES = {
    "strict": AcceptancePolicy.strict(),
    "loose": gated(0.12, regret_budget=3.0),
}


@pytest.fixture(scope="module")
def prompts(make_prompt):
    """Seven prompts of different lengths: videos, an image, text."""
    parts = [
        (3, ("video", 4, 6, 6), 5),
        (9,),
        (2, ("video", 1, 4, 4), 1),
        (1, ("video", 2, 4, 14), 7),
        (2, ("image", 4, 8), 4),
        (2, ("video", 3, 4, 6), 4, ("video", 2, 6, 4), 3),
        (30,),
    ]
    return [make_prompt(*each, seed=index, dtype=torch.float64) for index, each in enumerate(parts)]


@pytest.fixture(scope="module")
def alone(pair, prompts):
    """`alone(policy, config, draft)`: what each prompt gives by itself."""
    known = {}

    def run(policy, config, draft=True):
        key = (policy, config, draft)
        if key not in known:
            known[key] = [
                generate(
                    pair[0],
                    pair[1] if draft else None,
                    prompt,
                    policy=POLICIES[policy],
                    config=config,
                )
                for prompt in prompts
            ]
        return known[key]

    return run


def _config(**config):
    return DecodeConfig(**{"gamma": 4, "max_new_tokens": 20, "eos_ids": (), **config})


def _same(ours, theirs):
    assert ours.tokens.equal(theirs.tokens)
    assert ours.sequences.equal(theirs.sequences)
    assert ours.kinds.equal(theirs.kinds)
    torch.testing.assert_close(ours.relevance, theirs.relevance, equal_nan=True)
    assert ours.stats.num_accepted == theirs.stats.num_accepted
    assert ours.stats.counts == theirs.stats.counts
    assert ours.stats.regret == pytest.approx(theirs.stats.regret, abs=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("with_draft", [True, False])
def test_a_list_of_prompts(pair, prompts, alone, policy, with_draft):
    draft = pair[1] if with_draft else None
    found = generate(pair[0], draft, prompts, policy=POLICIES[policy], config=_config())
    wanted = alone(policy, _config(), with_draft)
    assert [generation.index for generation in found] == list(range(len(prompts)))
    for ours, theirs in zip(found, wanted, strict=True):
        _same(ours, theirs)
    lengths = {len(generation.stats.num_accepted) for generation in found}
    assert with_draft == (len(lengths) > 1), "sequences accept differently"


@pytest.mark.parametrize(
    "seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (3, 4, 5))]
)
def test_any_order_of_arrival(pair, prompts, alone, seed):
    """Ends of sequence that differ, places taken again, and batches smaller than the requests."""
    rng = random.Random(seed)
    policy, batch_size = rng.choice(list(POLICIES)), rng.randint(1, 4)
    ends = alone(policy, _config())[rng.randrange(7)].tokens[0].tolist()
    config = _config(eos_ids=tuple(ends[5:7]), max_new_tokens=rng.choice([1, 3, 20]))
    order = [rng.randrange(len(prompts)) for _ in range(9)]
    ordered = rng.random() < 0.5
    found = list(
        generate_many(
            *pair,
            (prompts[index] for index in order),
            batch_size=batch_size,
            policy=POLICIES[policy],
            config=config,
            ordered=ordered,
        )
    )
    wanted = alone(policy, config)
    places = [generation.index for generation in found]
    assert (places if ordered else sorted(places)) == list(range(len(order)))
    for generation in found:
        _same(generation, wanted[order[generation.index]])


def test_results_come_as_they_are_completed(pair, prompts, alone):
    """The second prompt ends with its first token; in order it waits for the first prompt."""
    end = int(alone("strict", _config())[1].tokens[0, 0])
    config = _config(eos_ids=(end,))
    given = (prompts[0], prompts[1], prompts[3])
    for ordered, wanted in ((False, 1), (True, 0)):
        results = generate_many(*pair, given, batch_size=2, config=config, ordered=ordered)
        assert next(results).index == wanted
        assert len(list(results)) == 2


def test_prompts_are_taken_one_at_a_time(pair, prompts):
    taken = []

    def requests():
        for index, prompt in enumerate(prompts):
            taken.append(index)
            yield prompt

    results = generate_many(*pair, requests(), batch_size=2, config=_config())
    assert not taken
    next(results)
    assert 2 <= len(taken) <= 3, "one for each place, and one more if the second ended first"
    assert len(list(results)) == 6


def test_a_prompt_that_comes_late_keeps_nobody_waiting(pair, prompts, alone):
    """None: the others go on, an iteration at a time, and it is asked for again."""
    config = _config()
    ended, asked = [], 0

    def arriving():
        nonlocal asked
        yield prompts[0]
        while not ended:  # that of the first prompt, for the second is not there before
            asked += 1
            yield None
        yield prompts[1]
        yield None  # behind the last: the end alone is the end
        yield prompts[2]

    results = {}
    policy = POLICIES["strict"]
    for result in generate_many(
        *pair, arriving(), batch_size=2, policy=policy, config=config, ordered=False
    ):
        ended.append(result.index)
        results[result.index] = result
    assert sorted(results) == [0, 1, 2] and asked > 1
    for index, expected in enumerate(alone("strict", config)[:3]):
        _same(results[index], expected)


def test_models_are_theirs_between_results(pair, prompts, hf_greedy):
    before = hf_greedy(pair[0], prompts[0], 8)
    for _ in generate_many(*pair, prompts[:3], batch_size=2, config=_config()):
        assert pair[0].model.language_model.config._attn_implementation == "sdpa"
        assert hf_greedy(pair[0], prompts[0], 8) == before


def test_a_refused_prompt(pair, prompts, alone):
    given = [prompts[0], {"input_ids": torch.ones(2, 3, dtype=torch.int64)}, prompts[1]]
    arguments = {"batch_size": 2, "policy": POLICIES["strict"], "config": _config()}
    results = list(generate_many(*pair, given, return_exceptions=True, **arguments))
    wanted = alone("strict", _config())
    _same(results[0], wanted[0])
    _same(results[2], wanted[1])
    assert isinstance(results[1], ValueError)
    assert results[1].index == 1
    results = generate_many(*pair, given, **arguments)
    _same(next(results), wanted[0])
    with pytest.raises(ValueError, match="target inputs: expected input_ids of shape"):
        next(results)


def test_nan_of_one_sequence_is_its_own(pair, prompts, alone):
    config = _config()
    target = copy.deepcopy(pair[0])
    calls = 0

    def spoil(module, arguments, logits):
        nonlocal calls
        calls += 1
        if calls == 5:  # three prompts, then the second iteration
            logits[1, 0] = torch.nan

    target.lm_head.register_forward_hook(spoil)
    results = list(
        generate_many(
            target,
            pair[1],
            prompts[:3],
            batch_size=3,
            policy=POLICIES["strict"],
            config=config,
            return_exceptions=True,
        )
    )
    wanted = alone("strict", config)
    _same(results[0], wanted[0])
    _same(results[2], wanted[2])
    assert isinstance(results[1], NonFiniteLogits)
    assert results[1].index == 1
    count = wanted[1].stats.num_accepted[0] + 2
    assert results[1].generation.tokens.equal(wanted[1].tokens[:, :count])


def test_an_interrupt_loses_nothing(pair, prompts, alone):
    class Stop:
        puts = 0

        def put(self, value):
            self.puts += 1
            if self.puts == 4:
                raise KeyboardInterrupt

        def end(self):
            pass

    class Quiet(Stop):
        def put(self, value):
            pass

    with pytest.raises(GenerationInterrupted) as caught:
        generate(
            *pair,
            prompts[:3],
            policy=POLICIES["strict"],
            config=_config(),
            streamer=[Quiet(), Stop(), Quiet()],
        )
    wanted = alone("strict", _config())
    found = caught.value.generations
    assert [generation.index for generation in found] == [0, 1, 2]
    for ours, theirs in zip(found, wanted, strict=False):
        count = ours.tokens.shape[1]
        assert count > 1
        assert ours.tokens.equal(theirs.tokens[:, :count])


def test_a_fixed_capacity(pair, prompts):
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    config = _config(cache_capacity=longest + 25)
    assert len(list(generate_many(*pair, prompts, batch_size=2, config=config))) == 7
    config = _config(cache_capacity=longest + 24)
    results = list(
        generate_many(*pair, prompts, batch_size=2, config=config, return_exceptions=True)
    )
    refused = [isinstance(result, ValueError) for result in results]
    assert refused == [prompt["input_ids"].shape[1] == longest for prompt in prompts]
    with pytest.raises(ValueError, match=f"cache_capacity: expected at least {longest + 25}"):
        generate(*pair, prompts, config=config)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
def test_batch_size_of_another_kind(pair, batch_size):
    with pytest.raises((TypeError, ValueError), match="batch_size: expected an integer"):
        generate_many(*pair, [], batch_size=batch_size)


def test_lists_that_do_not_fit(pair, prompts):
    assert generate(*pair, []) == []
    with pytest.raises(TypeError, match="inputs: expected prompts one after the other"):
        generate_many(*pair, prompts[0])
    with pytest.raises(ValueError, match="draft_inputs: expected 2 entries, .* got 1"):
        generate(*pair, prompts[:2], draft_inputs=prompts[:1])
    with pytest.raises(TypeError, match="streamer: expected a list of 2"):
        generate(*pair, prompts[:2], streamer=object())
    with pytest.raises(TypeError, match="draft_inputs: expected one, for a single prompt"):
        generate(*pair, prompts[0], draft_inputs=prompts[:1])
