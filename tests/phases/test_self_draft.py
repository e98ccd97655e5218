"""draft="self": the target's own weights over part of the target's own cache."""

import copy

import pytest
import torch
from policies import gated

from lvspec import (
    AcceptancePolicy,
    AnchorTree,
    DecodeConfig,
    DynamicTree,
    generate,
    generate_many,
)
from lvspec.models.inputs import check_inputs
from lvspec.models.model import Model
from lvspec.phases.draft import DraftSource, ModelDrafter, PromptReading
from lvspec.phases.draft.pruning import VideoPruning, prompt_importance, rows_to_keep

STRICT = AcceptancePolicy.strict()


@pytest.fixture(scope="module")
def target(random_pair):
    return copy.deepcopy(random_pair[0]).double()


@pytest.fixture(scope="module")
def prompts(make_prompt):
    parts = [
        (3, ("video", 4, 6, 6), 5),
        (9,),
        (2, ("image", 4, 8), 4),
        (2, ("video", 3, 4, 6), 4, ("video", 2, 6, 4), 3),
    ]
    found = [make_prompt(*each, seed=index) for index, each in enumerate(parts)]
    return [
        {name: x.double() if x.is_floating_point() else x for name, x in prompt.items()}
        for prompt in found
    ]


@pytest.fixture(scope="module")
def greedy(target, prompts, hf_greedy):
    return [hf_greedy(target, prompt, 24) for prompt in prompts]


def _config(**config):
    return DecodeConfig(**{"gamma": 5, "max_new_tokens": 24, "eos_ids": (), **config})


@pytest.mark.parametrize("capture", [True, False])
def test_with_the_whole_video_all_is_accepted(target, prompts, greedy, capture):
    found = generate(target, "self", prompts, policy=STRICT, config=_config(capture=capture))
    for generation, wanted in zip(found, greedy, strict=True):
        assert generation.tokens[0].tolist() == wanted
        assert set(generation.stats.num_accepted[:-1]) == {5}, "the last is cut"


@pytest.mark.parametrize("by", ["attention", "uniform"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.0])
def test_strict_is_greedy(target, prompts, greedy, share, by):
    config = _config(draft_keep=share, draft_keep_by=by)
    for prompt, wanted in zip(prompts, greedy, strict=True):
        found = generate(target, "self", prompt, policy=STRICT, config=config)
        assert found.tokens[0].tolist() == wanted


@pytest.mark.parametrize("share, by", [(0.5, "attention"), (0.1, "uniform")])
def test_in_a_batch_and_in_places_taken_again(target, prompts, share, by):
    """The same tokens by the same drafts as alone."""
    config = _config(draft_keep=share, draft_keep_by=by)
    alone = [generate(target, "self", prompt, policy=STRICT, config=config) for prompt in prompts]
    together = generate(target, "self", prompts, policy=STRICT, config=config)
    order = [3, 1, 0, 2, 1, 3]
    given = (prompts[index] for index in order)
    many = generate_many(target, "self", given, batch_size=2, policy=STRICT, config=config)
    pairs = [*zip(together, alone, strict=True)]
    pairs += zip(many, (alone[index] for index in order), strict=True)
    for ours, theirs in pairs:
        assert ours.tokens.equal(theirs.tokens)
        assert ours.stats.num_accepted == theirs.stats.num_accepted


def test_what_is_left_out_is_missed(target, prompts):
    config = _config(draft_keep=0.0, max_new_tokens=60)
    video, text = (
        generate(target, "self", prompt, policy=STRICT, config=config).stats.num_accepted
        for prompt in prompts[:2]
    )
    assert min(video[:-1]) < 5, "the video was left out"
    assert set(text[:-1]) == {5}, "there was none"


def test_a_loose_policy_in_a_batch(target, prompts):
    policy = gated(0.12, regret_budget=3.0)
    config = _config(draft_keep=0.1)
    alone = [generate(target, "self", prompt, policy=policy, config=config) for prompt in prompts]
    together = generate(target, "self", prompts, policy=policy, config=config)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.tokens.equal(theirs.tokens)
        assert ours.stats.counts == theirs.stats.counts
    assert sum(generation.stats.counts["loose"] for generation in alone) > 0


@torch.inference_mode()
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_the_prompt_is_copied(target, prompts, share):
    """Bitwise, into a cache of its own, without another prefill."""
    prompt = prompts[0]
    ids, length = prompt["input_ids"], prompt["input_ids"].shape[1]
    model = Model(target, "target")
    cache = model.new_cache(batch_size=2, capacity=length + 9, num_slots=6)
    model.prefill(check_inputs(model, prompt), cache, 1)
    before = [x.clone() for x in cache.tensors()]
    pruning = VideoPruning(model, share, "attention") if share < 1 else None
    drafter = ModelDrafter(
        DraftSource(model, 256, reading=PromptReading(pruning, is_target=True)), gamma=5
    )
    drafter.allocate(batch_size=2, capacity=length + 9)
    towers = []
    hook = target.model.visual.register_forward_hook(lambda *given: towers.append(1))
    drafter.prefill(None, 1, prompt=ids, target_cache=cache)
    hook.remove()
    assert not towers, "the video is not read again"
    assert all(x.equal(y) for x, y in zip(cache.tensors(), before, strict=True))
    own = drafter.cache
    assert own.k.data_ptr() != cache.k.data_ptr()
    visual = cache.visual[1, :length] != 0
    importance = prompt_importance(model, ids, cache, 1) if share == 0.5 else None
    rows = rows_to_keep(visual, share, importance)
    count = len(rows)
    assert count == int((~visual).sum()) + round(share * int(visual.sum()))
    for mine, theirs in ((own.k, cache.k), (own.v, cache.v)):
        assert mine[:, 1, :, :count].equal(theirs[:, 1, :, rows])
        assert not mine[:, 0].any()
    assert own.positions[:, 1, :count].equal(cache.positions[:, 1, rows])
    assert own.positions[:, 1, count : count + 9].equal(cache.positions[:, 1, length:])
    assert own.visual[1, :count].equal(cache.visual[1, rows])
    assert own.kv_len.tolist() == [0, count]
    assert drafter.removed.tolist() == [0, length - count]


def test_ends(target, prompts, greedy):
    for end in (greedy[0][4], greedy[0][11]):
        config = _config(draft_keep=0.5, eos_ids=(end,))
        found = generate(target, "self", prompts[0], policy=STRICT, config=config)
        assert found.tokens[0].tolist() == greedy[0][: greedy[0].index(end) + 1]
    for count in (1, 2, 7):
        config = _config(draft_keep=0.5, max_new_tokens=count)
        found = generate(target, "self", prompts[0], policy=STRICT, config=config)
        assert found.tokens[0].tolist() == greedy[0][:count]


def test_the_model_is_as_before(target, prompts, hf_greedy):
    before = hf_greedy(target, prompts[0], 8)
    generate(target, "self", prompts[0], config=_config(draft_keep=0.5))
    assert target.model.language_model.config._attn_implementation == "sdpa"
    assert hf_greedy(target, prompts[0], 8) == before


def test_a_fixed_capacity_is_enough(target, prompts, greedy):
    config = _config(draft_keep=0.1, cache_capacity=46 + 24 + 6)
    found = generate(target, "self", prompts[0], policy=STRICT, config=config)
    assert found.tokens[0].tolist() == greedy[0]


@pytest.mark.parametrize("capture", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tree": "specvlm"},
        {"tree": DynamicTree(1, 4)},  # of more nodes a level the greedy one may be none
        {"tree": AnchorTree(2, 3)},
        {"draft_ngram": 2, "draft_passes": 4},
        {"stop_at_unsure_anchors": 1e-6},
    ],
)
def test_a_prompt_that_ends_in_a_video(pair, make_prompt, hf_greedy, options, capture):
    """Its last row was made of a feature: drafting does not write it again as a token."""
    target = pair[0]
    config = DecodeConfig(gamma=4, max_new_tokens=13, eos_ids=(), capture=capture, **options)
    prompts = [_ending_in_a_video(make_prompt, words) for words in (5, 2)]
    given = {"policy": AcceptancePolicy.strict(), "config": config}
    found = generate(target, "self", [*prompts, make_prompt(4)], **given)
    for generation, prompt in zip(found, prompts):
        assert generation.tokens[0].tolist() == hf_greedy(target, prompt, 13)
        stats = generation.stats
        assert stats.num_accepted[:2] == [stats.depth] * 2
    assert found[2].stats.num_accepted[:2] == [found[2].stats.depth] * 2


def test_a_prompt_that_ends_in_a_video_has_nobody_to_ask(pair, make_prompt):
    """What is kept of it is at even distances."""
    prompt = _ending_in_a_video(make_prompt, 5)
    drafts = []
    for by in ("attention", "uniform"):
        config = DecodeConfig(
            gamma=4, max_new_tokens=9, eos_ids=(), draft_keep=0.5, draft_keep_by=by, trace=True
        )
        generation = generate(
            pair[0], "self", prompt, policy=AcceptancePolicy.strict(), config=config
        )
        drafts.append(generation.trace.steps())
    assert drafts[0] == drafts[1]


def _ending_in_a_video(make_prompt, words):
    prompt = make_prompt(words, ("video", 2, 6, 4), dtype=torch.float64)
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {name: x[:, :-1] if name in names else x for name, x in prompt.items()}
