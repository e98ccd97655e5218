"""ModelDrafter: what it proposes is the draft's own greedy continuation, whatever was accepted."""

import copy
from types import SimpleNamespace

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig, generate
from lvspec.models.inputs import check_inputs
from lvspec.models.model import Model
from lvspec.phases.draft import DraftSource, ModelDrafter


@pytest.fixture
def inputs(make_prompt):
    return make_prompt(3, ("video", 4, 6, 6), 5)


def _strict(target, draft, inputs, **kwargs):
    config = DecodeConfig(gamma=5, max_new_tokens=40, eos_ids=(), trace=True)
    policy = AcceptancePolicy.strict()
    return generate(target, draft, inputs, policy=policy, config=config, **kwargs)


@pytest.mark.parametrize("which", ["random", "noisy", "own"])
def test_every_draft_continues_the_output_greedily(
    random_pair, noisy_draft, inputs, which, hf_rows
):
    """After any acceptance, none or all, each drafted token is the best of HF's row before it.

    A token that only the target's vocabulary has reaches the draft as its last id.
    """
    target = random_pair[0]
    draft = {"random": random_pair[1], "noisy": noisy_draft, "own": target}[which]
    last_id = draft.config.text_config.vocab_size - 1
    generation = _strict(target, draft, inputs)
    tokens = generation.tokens.clamp(max=last_id)[0].tolist()
    for step in generation.trace.steps():
        rows, _ = hf_rows(draft, inputs, tokens[: step.position] + step.drafted)
        assert rows[step.position : -1].argmax(-1).tolist() == step.drafted


def test_draft_starts_with_two_rows(random_pair, inputs):
    """Two rows, then one at a time; where the last draft stood, the next is written."""
    draft = Model(random_pair[1], "draft", fuse="none")  # pass by pass, not at once
    drafter = ModelDrafter(DraftSource(draft, 256), gamma=3)
    drafter.allocate(batch_size=1, capacity=120)
    prompt = inputs["input_ids"]
    drafter.prefill(check_inputs(draft, inputs), 0, prompt=prompt, target_cache=drafter.cache)
    length = prompt.shape[1]
    rows = []
    step = draft.step

    def recorded(tokens, depths, ancestors, cache, **options):
        rows.append((int(cache.kv_len), tokens.shape[1]))
        return step(tokens, depths, ancestors, cache, **options)

    draft.step = recorded
    with drafter.active():
        for last_two, kv_len in (
            ([int(prompt[0, -1]), 9], length),
            ([5, 6], length + 3),
        ):
            state = SimpleNamespace(
                last_two=torch.tensor([last_two]),
                sampler=None,
                eos_ids=torch.tensor([], dtype=torch.int64),
            )
            draft_made = drafter.propose(state, torch.tensor([kv_len]))
            assert draft_made.tokens.shape == (1, 4)
            assert draft_made.tokens[0, 0] == last_two[1]
    assert rows == [
        (length - 1, 2),
        (length + 1, 1),
        (length + 2, 1),
        (length + 2, 2),
        (length + 4, 1),
        (length + 5, 1),
    ]


def test_target_token_beyond_the_drafts_vocabulary(random_pair, inputs):
    target, draft = random_pair
    generation = _strict(target, draft, inputs)
    assert generation.tokens.max() >= draft.config.text_config.vocab_size
    assert generation.tokens.equal(_strict(target, None, inputs).tokens)


@pytest.mark.parametrize("bigger", ["target", "draft"])
def test_only_shared_ids_are_proposed(random_pair, inputs, bigger):
    target, draft = random_pair if bigger == "target" else random_pair[::-1]
    if bigger == "draft":
        # Without the limit it would propose hardly anything but ids that the target lacks.
        draft = copy.deepcopy(draft)
        with torch.no_grad():
            draft.lm_head.weight[224:] *= 5
    generation = _strict(target, draft, inputs)
    assert max(max(step.drafted) for step in generation.trace.steps()) < 224
    assert generation.tokens.equal(_strict(target, None, inputs).tokens)


def test_draft_inputs(random_pair, inputs, make_prompt):
    target = random_pair[0]
    other = make_prompt(3, ("video", 4, 6, 6), 5, seed=8)
    same, different = (_strict(target, target, inputs, draft_inputs=d) for d in (inputs, other))
    assert same.tokens.equal(different.tokens)
    assert set(same.stats.num_accepted[:-1]) == {5}, "the last pass is cut"
    assert same.stats.tau > different.stats.tau


def test_draft_inputs_of_another_length(random_pair, inputs, make_prompt):
    shorter = make_prompt(3, ("video", 2, 6, 6), 5)
    with pytest.raises(ValueError, match=r"draft_inputs: expected a prompt of 46 .* got 28"):
        _strict(*random_pair, inputs, draft_inputs=shorter)
