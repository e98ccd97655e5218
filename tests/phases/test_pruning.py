"""Pruning of the video for the draft: which rows, that they are moved as they are, what follows."""

import copy
import math
import random

import pytest
import torch
from transformers import DynamicCache

from lvspec import AcceptancePolicy, DecodeConfig, generate, generate_many
from lvspec.models.hf_names import CACHE
from lvspec.models.inputs import check_inputs
from lvspec.models.model import Model
from lvspec.phases.draft import DraftSource, ModelDrafter, PromptReading
from lvspec.phases.draft.pruning import QUERY_ROWS, VideoPruning, prompt_importance, rows_to_keep

STRICT = AcceptancePolicy.strict()
KEEPS = [1.0, 0.5, 0.1, 0.0]
WAYS = ["attention", "uniform"]


def _double(prompt):
    return {name: x.double() if x.is_floating_point() else x for name, x in prompt.items()}


@pytest.fixture(scope="module")
def pair(random_pair, noisy_draft):
    return tuple(copy.deepcopy(model).double() for model in (random_pair[0], noisy_draft))


@pytest.fixture(scope="module")
def prompts(make_prompt):
    """A video, text, an image, two videos with text between, and one with a single word behind."""
    parts = [
        (3, ("video", 4, 6, 6), 5),
        (9,),
        (2, ("image", 4, 8), 4),
        (2, ("video", 3, 4, 6), 4, ("video", 2, 6, 4), 30),
        (1, ("video", 2, 4, 14), 1),
    ]
    return [_double(make_prompt(*each, seed=index)) for index, each in enumerate(parts)]


def _config(**config):
    return DecodeConfig(**{"gamma": 4, "max_new_tokens": 20, "eos_ids": (), **config})


# Which rows.


@pytest.mark.parametrize(
    "share, importance, expected",
    [
        (0.5, [0, 5, 1, 3, 1, 0], [0, 1, 3, 5]),  # 5 has the mass alone, then the middle of three
        (0.5, None, [0, 2, 4, 5]),
        (0.5, [0, 3, 0, 0, 3, 0], [0, 1, 3, 5]),  # of equal ones the first, then from 2, 3, 4
        (0.75, [0, 2, 2, 2, 2, 0], [0, 1, 2, 4, 5]),  # two for the mass, one of two
        (0.25, [0, 1, 1, 1, 1, 0], [0, 1, 5]),  # the share is less than the mass wants
        (0.25, None, [0, 3, 5]),
        (0.1, None, [0, 5]),
        (0.0, [0, 5, 1, 3, 1, 0], [0, 5]),
        (1.0, [0, 5, 1, 3, 1, 0], [0, 1, 2, 3, 4, 5]),
        (1.0, None, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_rows_of_four_video_tokens(share, importance, expected):
    visual = torch.tensor([False, True, True, True, True, False])
    if importance is not None:
        importance = torch.tensor(importance).float()
    assert rows_to_keep(visual, share, importance).tolist() == expected


def test_rows_without_a_video_and_of_nothing_else():
    assert rows_to_keep(torch.zeros(4, dtype=torch.bool), 0.5).tolist() == [0, 1, 2, 3]
    assert rows_to_keep(torch.ones(4, dtype=torch.bool), 0.0).tolist() == [3], "drafts begin there"


def _in_python(visual, share, importance):
    video = [row for row, flag in enumerate(visual) if flag]
    wanted = round(share * len(video))
    kept = set()
    if importance is not None:
        total = math.fsum(importance[row] for row in video)
        for row in sorted(video, key=lambda row: -importance[row]):
            if len(kept) == wanted or math.fsum(importance[r] for r in kept) >= 0.4 * total:
                break
            kept.add(row)
    rest = [row for row in video if row not in kept]
    left = wanted - len(kept)
    kept |= {rest[(2 * part + 1) * len(rest) // (2 * left)] for part in range(left)}
    assert len(kept) == wanted
    kept |= {row for row, flag in enumerate(visual) if not flag} | {len(visual) - 1}
    return sorted(kept)


@pytest.mark.parametrize("seed", range(30))
def test_rows_as_in_python(seed):
    rng = random.Random(seed)
    visual = torch.rand(rng.randint(2, 60)) < rng.random()
    share = rng.choice([0.05, 0.1, 0.3, 0.5, 0.9])
    importance = torch.rand(len(visual), dtype=torch.float64) ** rng.choice([1, 8])
    for given in (importance, None):
        wanted = _in_python(visual.tolist(), share, None if given is None else given.tolist())
        assert rows_to_keep(visual, share, given).tolist() == wanted


# What the target looks at.


def _read(hf, prompt, role="target"):
    model = Model(hf, role)
    length = prompt["input_ids"].shape[1]
    cache = model.new_cache(batch_size=3, capacity=length + 9, num_slots=5)
    model.prefill(check_inputs(model, prompt), cache, 1)
    return model, cache


@torch.inference_mode()
@pytest.mark.parametrize("index, rows", [(0, 6), (2, 5), (3, QUERY_ROWS), (4, 2)])
def test_importance_is_the_attention_of_the_last_rows(pair, prompts, index, rows):
    """HF's own weights, from eager attention; rows behind the video, its end mark included."""
    prompt = prompts[index]
    model, cache = _read(pair[0], prompt)
    before = [x.clone() for x in cache.tensors()]
    found = prompt_importance(model, prompt["input_ids"], cache, 1)
    assert all(x.equal(y) for x, y in zip(cache.tensors(), before, strict=True))
    text = pair[0].model.language_model
    assert text.config._attn_implementation == "sdpa"
    text.set_attn_implementation("eager")
    try:
        weights = pair[0](**prompt, output_attentions=True).attentions
    finally:
        text.set_attn_implementation("sdpa")
    expected = sum(layer[0, :, -rows:].sum((0, 1)) for layer in weights)
    ids = prompt["input_ids"][0]
    expected = expected.masked_fill((ids != 5) & (ids != 6), 0)
    # HF rounds each weight to float32, and this many of them are summed.
    count = rows * len(weights) * weights[0].shape[1]
    atol = count * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    assert float(expected.max()) > 1e4 * atol
    assert found.dtype == torch.float64


# What moves.


@torch.inference_mode()
@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("share", [0.5, 0.1, 0.0])
@pytest.mark.parametrize("index", range(5))
def test_the_cache_holds_the_kept_rows(pair, prompts, index, share, by):
    prompt = prompts[index]
    target, target_cache = _read(pair[0], prompt)
    draft, whole = _read(pair[1], prompt, "draft")
    ids, capacity = prompt["input_ids"], target_cache.capacity
    pruning = VideoPruning(target, share, by)
    drafter = ModelDrafter(DraftSource(draft, 256, reading=PromptReading(pruning)), gamma=4)
    drafter.allocate(batch_size=3, capacity=capacity)
    drafter.prefill(check_inputs(draft, prompt), 1, prompt=ids, target_cache=target_cache)

    visual = (ids[0] == 5) | (ids[0] == 6)
    importance = None
    if by == "attention" and visual.any():
        importance = prompt_importance(target, ids, target_cache, 1)
    rows = rows_to_keep(visual, share, importance)
    count, length, cache = len(rows), ids.shape[1], drafter.cache
    assert int(visual[rows].sum()) == round(share * int(visual.sum()))
    assert drafter.removed.tolist() == [0, length - count, 0]
    assert cache.kv_len.tolist() == [0, count, 0]
    for mine, theirs in ((cache.k, whole.k), (cache.v, whole.v)):
        assert mine[:, 1, :, :count].equal(theirs[:, 1, :, rows])
        assert not mine[:, ::2].any(), "other places are left alone"
    assert cache.visual[1, :count].equal(visual[rows].to(torch.uint8))
    assert not cache.visual[1, count:].any()
    assert cache.positions[:, 1, :count].equal(whole.positions[:, 1, rows])
    following = cache.positions[:, 1, count : count + capacity - length]
    assert following.equal(whole.positions[:, 1, length:]), "they go on as before"
    assert drafter._own_length(torch.tensor([0, length + 3, 0])).tolist() == [0, count + 3, 0]


def _pruned_rows(model, inputs, rows, tokens):
    """HF's logits of the rows behind a prompt of which the cache keeps `rows`; the first is that of
    the prompt's last token, which drafting writes again."""
    ids = inputs["input_ids"]
    positions = Model(model, "draft").family.prompt_positions(model, inputs)
    cache = DynamicCache()
    given = {name: value for name, value in inputs.items() if name != "attention_mask"}
    model(**given, position_ids=positions, **{CACHE: cache})
    for layer in cache.layers:
        layer.keys, layer.values = (x[:, :, rows[:-1]] for x in (layer.keys, layer.values))
    fed = torch.cat([ids[:, -1:], torch.tensor([tokens])], dim=1)
    places = positions[:, :, -1:] + torch.arange(fed.shape[1])
    return model(input_ids=fed, position_ids=places, **{CACHE: cache}).logits[0]


@torch.no_grad()
@pytest.mark.parametrize("share", [0.5, 0.1, 0.0])
@pytest.mark.parametrize("index", [0, 3])
def test_drafts_are_those_of_a_cache_of_the_kept_rows(pair, prompts, index, share):
    """After any acceptance each drafted token is the best of HF's row over the kept rows.

    The draft has the target's weights, so that with half of the video some drafts are accepted.
    """
    prompt = prompts[index]
    config = _config(draft_keep=share, draft_keep_by="uniform", max_new_tokens=40, trace=True)
    model = pair[0]
    generation = generate(model, model, prompt, policy=STRICT, config=config)
    ids = prompt["input_ids"][0]
    rows = rows_to_keep((ids == 5) | (ids == 6), share)
    tokens = generation.tokens[0].tolist()
    steps = generation.trace.steps()
    assert len(steps) > 5
    if share == 0.5:
        assert len({step.num_accepted for step in steps}) > 1
    for step in steps:
        logits = _pruned_rows(model, prompt, rows, tokens[: step.position] + step.drafted)
        assert logits[step.position : -1].argmax(-1).tolist() == step.drafted


# What comes out.


@pytest.fixture(scope="module")
def greedy(pair, prompts, hf_greedy):
    return [hf_greedy(pair[0], prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("share", KEEPS)
def test_strict_is_greedy(pair, prompts, greedy, share, by):
    config = _config(draft_keep=share, draft_keep_by=by)
    for prompt, wanted in zip(prompts, greedy, strict=True):
        found = generate(*pair, prompt, policy=STRICT, config=config)
        assert found.tokens[0].tolist() == wanted


@pytest.mark.parametrize("share, by", [(0.5, "attention"), (0.1, "uniform")])
def test_in_a_batch_and_in_places_taken_again(pair, prompts, share, by):
    """The same tokens by the same drafts as alone."""
    config = _config(draft_keep=share, draft_keep_by=by)
    alone = [generate(*pair, prompt, policy=STRICT, config=config) for prompt in prompts]
    together = generate(*pair, prompts, policy=STRICT, config=config)
    order = [3, 1, 0, 4, 2, 1, 3]
    given = (prompts[index] for index in order)
    many = generate_many(*pair, given, batch_size=2, policy=STRICT, config=config)
    pairs = [*zip(together, alone, strict=True)]
    pairs += zip(many, (alone[index] for index in order), strict=True)
    for ours, theirs in pairs:
        assert ours.tokens.equal(theirs.tokens)
        assert ours.stats.num_accepted == theirs.stats.num_accepted


@pytest.mark.parametrize("draft", ["model", "self"])
def test_in_float32(random_pair, noisy_draft, make_prompt, hf_greedy, draft):
    """On whatever backend there is; two prompts, of which one is read after the other's plan."""
    target = random_pair[0]
    prompts = [
        make_prompt(3, ("video", 4, 6, 6), 5),
        make_prompt(2, ("video", 2, 4, 14), 4, seed=1),
    ]
    found = generate(
        target,
        noisy_draft if draft == "model" else "self",
        prompts,
        policy=STRICT,
        config=_config(draft_keep=0.3, max_new_tokens=12),
    )
    for generation, prompt in zip(found, prompts, strict=True):
        assert generation.tokens[0].tolist() == hf_greedy(target, prompt, 12)


def test_what_is_kept_matters(pair, prompts):
    """With the target's own weights for a draft, fewer tokens are accepted the less it sees."""
    taus = [
        generate(
            pair[0],
            copy.deepcopy(pair[0]),
            prompts[0],
            policy=STRICT,
            config=_config(draft_keep=share, max_new_tokens=61),
        ).stats.tau
        for share in (1.0, 0.0)
    ]
    assert taus[0] == 5 > taus[1]


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_ends(pair, prompts, greedy, share):
    for end in (greedy[0][6], greedy[0][13]):
        config = _config(draft_keep=share, eos_ids=(end,))
        found = generate(*pair, prompts[0], policy=STRICT, config=config).tokens[0].tolist()
        assert found == greedy[0][: greedy[0].index(end) + 1]
    for count in (1, 2):
        config = _config(draft_keep=share, max_new_tokens=count)
        found = generate(*pair, prompts[0], policy=STRICT, config=config).tokens[0].tolist()
        assert found == greedy[0][:count]


def test_video_elsewhere_in_the_drafts_prompt(pair, prompts, greedy, make_prompt):
    """The target's attention says nothing about it; even distances need no attention."""
    other = _double(make_prompt(2, ("video", 4, 6, 6), 6))
    run = {"draft_inputs": other, "policy": STRICT}
    with pytest.raises(ValueError, match="^draft_inputs: expected video tokens where"):
        generate(*pair, prompts[0], config=_config(draft_keep=0.5), **run)
    config = _config(draft_keep=0.5, draft_keep_by="uniform")
    assert generate(*pair, prompts[0], config=config, **run).tokens[0].tolist() == greedy[0]
