"""generate with strict(): HF's greedy tokens, whatever drafts, however long and wherever it ends.

Near ties. One row and a block of rows differ in the last bits, so in float32 two tokens whose
logits nearly tie may change places. The rule here: sequences are equal, or at their first
difference HF's own logits of the two tokens, over the common prefix, differ by less than `TIE`.
In float64 the sequences are equal.
"""

import copy
from itertools import zip_longest

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig, generate
from lvspec.reference.kinds import KIND_NAMES

TIE = 1e-4
PROMPTS = {  # parts, and the seconds between two grids of a video
    "video": ((3, ("video", 4, 6, 6), 5), 1.0),
    "wide video": ((1, ("video", 2, 4, 14), 7), 1.0),
    "one frame pair": ((2, ("video", 1, 4, 4), 1), 1.0),
    # Time reaches far beyond the text that follows: positions jump after the prompt.
    "long video, one word": ((2, ("video", 9, 4, 4), 1), 4.0),
    "nothing after the video": ((2, ("video", 6, 4, 4)), 3.0),
    "two videos": ((2, ("video", 3, 4, 6), 4, ("video", 2, 6, 4), 3), 2.0),
    "image and video": ((("image", 6, 4), 3, ("video", 3, 4, 4), 2), 1.0),
    "image": ((2, ("image", 4, 8), 4), 1.0),
    "text": ((9,), 1.0),
}


@pytest.fixture(params=PROMPTS)
def prompt(request, make_prompt):
    parts, seconds = PROMPTS[request.param]
    return make_prompt(*parts, seconds=seconds)


@pytest.fixture
def drafts(random_pair, noisy_draft):
    return {"random": random_pair[1], "noisy": noisy_draft, "own": random_pair[0]}


@pytest.fixture
def assert_greedy(hf_greedy, hf_rows):
    """`assert_greedy(target, inputs, generation, count, eos_ids)`: HF's tokens, by the rule."""

    def check(target, inputs, generation, count, eos_ids=()):
        tokens = generation.tokens[0].tolist()
        wanted = hf_greedy(target, inputs, count, eos_ids)
        for index, (token, want) in enumerate(zip_longest(tokens, wanted)):
            if token != want:
                assert None not in (token, want), f"{tokens} is not as long as {wanted}"
                logits = hf_rows(target, inputs, [*wanted[:index], want])[0][index]
                gap = float(logits[want] - logits[token])
                assert gap < TIE, f"token {index}: {token} for {want}, {gap} nats below"
                break
        prompt_length = inputs["input_ids"].shape[1]
        assert generation.sequences[0, :prompt_length].equal(inputs["input_ids"][0])
        assert generation.sequences[0, prompt_length:].tolist() == tokens

    return check


def _strict(target, draft, inputs, **config):
    config = DecodeConfig(**{"eos_ids": (), **config})
    return generate(target, draft, inputs, policy=AcceptancePolicy.strict(), config=config)


@pytest.mark.parametrize(
    "draft, gamma",
    [
        *[("random", 2), ("random", 12), ("noisy", 1), ("noisy", 5), ("own", 5)],
        pytest.param("own", 63, marks=pytest.mark.slow),
    ],
)
def test_strict_is_greedy(random_pair, drafts, draft, prompt, gamma, assert_greedy):
    target = random_pair[0]
    generation = _strict(target, drafts[draft], prompt, gamma=gamma, max_new_tokens=24)
    assert_greedy(target, prompt, generation, 24)


def test_autoregression_is_greedy(random_pair, prompt, assert_greedy):
    target = random_pair[0]
    generation = _strict(target, None, prompt, max_new_tokens=24)
    assert_greedy(target, prompt, generation, 24)
    assert generation.kinds.tolist() == [[KIND_NAMES.index("bonus")] * 24]
    assert (generation.stats.num_iterations, generation.stats.tau) == (23, 1.0)


@pytest.mark.parametrize("gamma", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_strict_is_greedy_in_float64_without_a_rule(
    random_pair, noisy_draft, prompt, gamma, hf_greedy
):
    target, draft = (copy.deepcopy(model).double() for model in (random_pair[0], noisy_draft))
    inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in prompt.items()
    }
    generation = _strict(target, draft, inputs, gamma=gamma, max_new_tokens=24)
    assert generation.tokens[0].tolist() == hf_greedy(target, inputs, 24)


@pytest.mark.parametrize("gamma", [1, 2, 5, 12, 63])
@pytest.mark.parametrize("seed", range(4))
def test_target_as_its_own_draft_is_always_right(random_pair, make_prompt, gamma, seed):
    target = random_pair[0]
    inputs = make_prompt(2, ("video", 2 + seed, 4, 6), 3, seed=seed)
    iterations = -(-39 // (gamma + 1))
    count = 1 + iterations * (gamma + 1)  # whole iterations behind the prompt's own token
    stats = _strict(target, target, inputs, gamma=gamma, max_new_tokens=count).stats
    assert stats.tau == gamma + 1
    assert stats.num_iterations == iterations
    assert stats.acceptance_by_position == [1.0] * gamma
    assert stats.regret == 0


def test_partial_acceptance_at_every_position(random_pair, noisy_draft, make_prompt, assert_greedy):
    target, gamma, seen = random_pair[0], 4, set()
    for seed in range(6):
        inputs = make_prompt(3, ("video", 4, 6, 6), 5, seed=seed)
        generation = _strict(target, noisy_draft, inputs, gamma=gamma, max_new_tokens=60)
        assert_greedy(target, inputs, generation, 60)
        seen.update(generation.stats.num_accepted)
    assert seen == set(range(gamma + 1))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("draft", ["random", "noisy", "own"])
def test_max_new_tokens(random_pair, drafts, draft, make_prompt, count, assert_greedy):
    inputs = make_prompt(2, ("video", 2, 4, 4), 3)
    for gamma in (1, 12):
        generation = _strict(
            random_pair[0], drafts[draft], inputs, gamma=gamma, max_new_tokens=count
        )
        assert generation.tokens.shape == (1, count)
        assert (generation.stats.num_iterations == 0) == (count == 1)
        assert_greedy(random_pair[0], inputs, generation, count)


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("draft", ["random", "noisy", "own"])
def test_end_of_sequence_anywhere(random_pair, drafts, draft, make_prompt, gamma, hf_greedy):
    """Each token of a greedy sequence in turn is the end: first, bonus, or inside a draft."""
    target = random_pair[0]
    inputs = make_prompt(3, ("video", 4, 6, 6), 5)
    greedy = hf_greedy(target, inputs, 24)
    kinds = set()
    for end in dict.fromkeys(greedy):
        generation = _strict(
            target, drafts[draft], inputs, gamma=gamma, max_new_tokens=24, eos_ids=(end,)
        )
        assert generation.tokens[0].tolist() == greedy[: greedy.index(end) + 1]
        kinds.add(KIND_NAMES[generation.kinds[0, -1]])
        assert (generation.stats.num_iterations == 0) == (end == greedy[0])
    if draft == "own":
        assert kinds == {"exact", "bonus"}


def test_several_end_of_sequence_ids(random_pair, make_prompt, hf_greedy):
    target = random_pair[0]
    inputs = make_prompt(3, ("video", 4, 6, 6), 5)
    distinct = list(dict.fromkeys(hf_greedy(target, inputs, 24)))
    for ends in ((distinct[6], distinct[3]), (distinct[4], 999)):
        wanted = hf_greedy(target, inputs, 24, ends)
        assert len(wanted) < 24
        for draft in (None, target):
            generation = _strict(target, draft, inputs, gamma=5, max_new_tokens=24, eos_ids=ends)
            assert generation.tokens[0].tolist() == wanted


@pytest.mark.parametrize("as_list", [True, False])
def test_end_of_sequence_of_the_generation_config(
    random_pair, make_prompt, hf_greedy, monkeypatch, as_list
):
    target = random_pair[0]
    inputs = make_prompt(3, ("video", 4, 6, 6), 5)
    greedy = hf_greedy(target, inputs, 24)
    end = greedy[8]
    monkeypatch.setattr(target.generation_config, "eos_token_id", [end] if as_list else end)
    generation = _strict(target, target, inputs, gamma=5, max_new_tokens=24, eos_ids=None)
    assert generation.tokens[0].tolist() == greedy[: greedy.index(end) + 1]


def test_end_of_sequence_of_the_policy(random_pair, make_prompt, hf_greedy):
    """Between those of DecodeConfig and those of the model."""
    target = random_pair[0]
    inputs = make_prompt(3, ("video", 4, 6, 6), 5)
    greedy = hf_greedy(target, inputs, 24)
    policy = AcceptancePolicy.strict(eos_ids=(greedy[8],))
    for eos_ids, end in ((None, greedy[8]), ((greedy[4],), greedy[4])):
        config = DecodeConfig(gamma=5, max_new_tokens=24, eos_ids=eos_ids)
        generation = generate(target, target, inputs, policy=policy, config=config)
        assert generation.tokens[0].tolist() == greedy[: greedy.index(end) + 1]


def test_end_of_sequence_of_the_text_config(random_pair, make_prompt, hf_greedy, monkeypatch):
    target = random_pair[0]
    inputs = make_prompt(3, ("video", 4, 6, 6), 5)
    greedy = hf_greedy(target, inputs, 24)
    monkeypatch.setattr(target.config.text_config, "eos_token_id", greedy[8])
    generation = _strict(target, target, inputs, gamma=5, max_new_tokens=24, eos_ids=None)
    assert generation.tokens[0].tolist() == greedy[: greedy.index(greedy[8]) + 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_prompt_is_dropped(random_pair, make_prompt, hf_greedy, side):
    target, draft = random_pair
    inputs = make_prompt(3, ("video", 4, 6, 6), 5)
    padded = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        pad = (3, 0) if side == "left" else (0, 3)
        padded[name] = torch.nn.functional.pad(inputs[name], pad)
    generation = _strict(target, draft, padded, gamma=5, max_new_tokens=24)
    assert generation.tokens[0].tolist() == hf_greedy(target, inputs, 24)


def test_token_types_are_found_if_missing(random_pair, make_prompt, hf_greedy):
    target, draft = random_pair
    inputs = make_prompt(("image", 4, 4), 3, ("video", 9, 4, 4), 1, seconds=4.0)
    wanted = hf_greedy(target, inputs, 24)
    del inputs["mm_token_type_ids"], inputs["attention_mask"]
    assert _strict(target, draft, inputs, max_new_tokens=24).tokens[0].tolist() == wanted


def test_prefill_attention_may_be_eager(random_pair, make_prompt, hf_greedy):
    target, draft = (copy.deepcopy(model) for model in random_pair)
    inputs = make_prompt(3, ("video", 4, 6, 6), 5)
    for model in (target, draft):
        model.set_attn_implementation("eager")
    generation = _strict(target, draft, inputs, gamma=5, max_new_tokens=24)
    assert generation.tokens[0].tolist() == hf_greedy(target, inputs, 24)
    assert target.model.language_model.config._attn_implementation == "eager"
