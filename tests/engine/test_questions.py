"""Several prompts about one clip: each gives what it gives alone, and the clip is read once.

In float64, where rows of different passes do not differ by enough to change a token.
"""

import copy

import pytest
import torch
from policies import gated

from lvspec import AcceptancePolicy, DecodeConfig, Decoder
from lvspec.engine.api import generate

POLICIES = {"strict": AcceptancePolicy.strict(), "loose": gated(0.12, regret_budget=3.0)}


@pytest.fixture(scope="module")
def clip(make_prompt):
    """Inputs of a prompt with a clip in it, and words behind that."""
    return make_prompt(3, ("video", 3, 6, 6), 5, dtype=torch.float64)


@pytest.fixture(scope="module")
def prompts(clip):
    """Five: of other lengths, one that is the beginning of another, and one twice."""
    ids = clip["input_ids"]
    ends = [[20, 21, 22, 23, 24], [20, 21], [20, 21, 30, 31, 32, 33, 34, 35, 36, 37], [40]]
    made = [torch.cat([ids[:, :-5], torch.tensor([end])], dim=1) for end in ends]
    return [*made, made[0]]


def alone(target, draft, clip, prompts, **options):
    inputs = {name: value for name, value in clip.items() if name != "mm_token_type_ids"}
    return [
        generate(target, draft, {**inputs, "input_ids": ids, "attention_mask": ids > -1}, **options)
        for ids in prompts
    ]


def count_calls(module, calls):
    return module.register_forward_hook(lambda *_: calls.append(1))


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("policy", "draft", "options"),
    [
        ("strict", "model", {}),
        ("loose", "model", {}),
        ("strict", "none", {}),
        ("strict", "model", {"fuse": "none"}),
        slow("loose", "model", {"fuse": "none"}),
        slow("loose", "model", {"tree": "specvlm"}),
        slow("strict", "model", {"draft_keep": 0.5}),
        slow("loose", "model", {"draft_keep": 0.5}),
        slow("strict", "model", {"draft_ngram": 3}),
        slow("loose", "self", {"draft_keep": 0.5}),
    ],
)
def test_each_is_what_it_is_alone(pair, clip, prompts, policy, draft, options):
    target, drafter = pair[0], {"model": pair[1], "self": "self", "none": None}[draft]
    given = {"gamma": 4, "max_new_tokens": 12, **options}
    if "tree" in options:
        del given["gamma"]
    config = DecodeConfig(**given)
    options = {"policy": POLICIES[policy], "config": config}
    ours = generate(target, drafter, clip, prompts=prompts, **options)
    for one, ids, other in zip(
        ours, prompts, alone(target, drafter, clip, prompts, **options), strict=True
    ):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.kinds, other.kinds)
        assert torch.equal(one.sequences[:, : ids.shape[1]], ids)
        assert one.stats.num_accepted == other.stats.num_accepted


@pytest.mark.parametrize("fuse", ["kernels", "none"])
def test_float8_caches_are_read_each_by_itself(pair, clip, prompts, fuse):
    """What a prompt sees of the clip is not what they keep; that nothing is shared is said."""
    target, draft = (copy.deepcopy(model) for model in pair[:2])  # they have said nothing yet
    config = DecodeConfig(gamma=4, max_new_tokens=12, fuse=fuse, cache_dtype="fp8")
    options = {"policy": POLICIES["loose"], "config": config}
    with pytest.warns(RuntimeWarning, match="prompts about one clip .* slower: with") as said:
        ours = generate(target, draft, clip, prompts=prompts, **options)
    assert sum("about one clip" in str(each.message) for each in said) == 2
    for one, other in zip(ours, alone(target, draft, clip, prompts, **options), strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.kinds, other.kinds)


def test_the_clip_is_read_once_by_both(pair, clip, prompts):
    calls = {role: [] for role in ("target", "draft")}
    hooks = [
        count_calls(model.model.visual, calls[role])
        for role, model in zip(calls, pair[:2], strict=True)
    ]
    config = DecodeConfig(gamma=4, max_new_tokens=6)
    try:
        generate(*pair[:2], clip, prompts=prompts, config=config)
        assert calls == {"target": [1], "draft": [1]}
        alone(*pair[:2], clip, prompts, config=config)
        assert len(calls["target"]) == 1 + len(prompts)
    finally:
        for hook in hooks:
            hook.remove()


def test_more_prompts_than_places(pair, clip, prompts):
    """Whoever finds nobody there to copy from reads the clip anew."""
    config = DecodeConfig(gamma=4, max_new_tokens=12)
    options = {"policy": POLICIES["strict"], "config": config}
    for places in (1, 2):
        decoder = Decoder(*pair[:2], *options.values(), batch_size=places)
        ours = decoder.generate(clip, prompts=prompts)
        for one, other in zip(ours, alone(*pair[:2], clip, prompts, **options), strict=True):
            assert torch.equal(one.tokens, other.tokens)


def test_prompts_that_end_at_once(pair, clip, prompts):
    """The place of the first is free again before the second is read."""
    config = DecodeConfig(gamma=4, max_new_tokens=1)
    ours = generate(*pair[:2], clip, prompts=prompts, config=config)
    for one, other in zip(ours, alone(*pair[:2], clip, prompts, config=config), strict=True):
        assert torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize("policy", ["one", "each"])
def test_what_comes_with_prompts(pair, clip, prompts, policy):
    """Policies and the draft's own inputs."""
    policies = [POLICIES["strict"], POLICIES["loose"]]
    given = POLICIES["loose"] if policy == "one" else policies
    config = DecodeConfig(gamma=4, max_new_tokens=12)
    options = {"config": config, "draft_inputs": dict(clip)}
    ours = generate(*pair[:2], clip, prompts=prompts[:2], policy=given, **options)
    for index, one in enumerate(ours):
        mine = given if policy == "one" else policies[index]
        (other,) = alone(*pair[:2], clip, prompts[index : index + 1], policy=mine, config=config)
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.kinds, other.kinds)
    assert generate(*pair[:2], clip, prompts=[], config=config) == []


def test_wrong_prompts_are_refused(pair, clip, prompts):
    before = prompts[0].clone()
    before[0, 0] += 1  # a word in front of the clip
    with pytest.raises(ValueError, match="^prompts: expected ones that are the same up to the end"):
        generate(*pair[:2], clip, prompts=[prompts[0], before])
    with pytest.raises(ValueError, match="^prompts: .* with words behind it"):
        generate(*pair[:2], clip, prompts=[prompts[0][:, :-6], prompts[0]])
    with pytest.raises(TypeError, match="^prompts: expected tensors of token ids, got str"):
        generate(*pair[:2], clip, prompts=["what?"])
    with pytest.raises(TypeError, match="^inputs: expected those of one prompt, got list"):
        generate(*pair[:2], [clip], prompts=prompts)
