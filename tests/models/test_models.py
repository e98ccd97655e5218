"""Model: prefill and steps over a SlotCache are HF's forward, for trees and ragged sequences."""

import pytest
import torch
from transformers import DynamicCache

from lvspec.models.attention import lvspec_attention_on
from lvspec.models.hf_names import CACHE
from lvspec.models.inputs import check_inputs
from lvspec.models.model import Model
from lvspec.tree import ancestors_from_parents, depths, paths

TREE = torch.tensor([-1, 0, 0, 1, 1, 2, 5], dtype=torch.int32)


@pytest.fixture
def target(random_pair):
    return Model(random_pair[0], "target")


@pytest.fixture
def prompts(make_prompt):
    """Of different lengths; the positions of the second jump after the prompt."""
    return [
        make_prompt(3, ("video", 4, 6, 6), 5),
        make_prompt(1, ("video", 9, 4, 4), 1, seconds=4.0, seed=1),
        make_prompt(8, seed=2),
    ]


@pytest.fixture
def prefilled(target, prompts):
    """A cache of three slots, filled in another order than theirs."""
    cache = target.new_cache(batch_size=3, capacity=100, num_slots=16)
    with torch.no_grad():
        for slot in (2, 0, 1):
            target.prefill(check_inputs(target, prompts[slot]), cache, slot)
    return cache


def _positions(target, inputs):
    if "video_grid_thw" not in inputs:
        return torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    given = {k: v for k, v in inputs.items() if k not in ("pixel_values_videos", "attention_mask")}
    ids = given.pop("input_ids")
    return target.hf.model.get_rope_index(ids, **given)[0]


@torch.no_grad()
def _sequential(target, inputs, tokens):
    """HF's logits after each of `tokens`, decoded one by one behind the prompt."""
    cache, rows = DynamicCache(), []
    positions = _positions(target, inputs)
    given = {name: value for name, value in inputs.items() if name != "attention_mask"}
    target.hf(**given, position_ids=positions, **{CACHE: cache})
    for depth, token in enumerate(tokens):
        output = target.hf(
            input_ids=torch.tensor([[token]]),
            position_ids=positions[:, :, -1:] + 1 + depth,
            **{CACHE: cache},
        )
        rows.append(output.logits[0, -1])
    return torch.stack(rows)


def test_prefill_by_hf_code_is_the_models_own_to_the_bit(target, prompts):
    plain, cache = Model(target.hf, "target", fuse="none"), DynamicCache()
    ours = plain.new_cache(batch_size=1, capacity=99, num_slots=1)
    with torch.no_grad():
        plain.prefill(check_inputs(plain, prompts[0]), ours, 0)
        target.hf.model.rope_deltas = None
        target.hf(**prompts[0], **{CACHE: cache})
    length = prompts[0]["input_ids"].shape[1]
    for layer, (k, v) in enumerate(zip(ours.k, ours.v)):
        assert k[0, :, :length].equal(cache.layers[layer].keys[0])
        assert v[0, :, :length].equal(cache.layers[layer].values[0])


def test_prefill_is_the_models_own_forward(target, prompts, prefilled):
    for slot, inputs in enumerate(prompts):
        cache = DynamicCache()
        with torch.no_grad():
            target.hf.model.rope_deltas = None
            logits = target.hf(**inputs, **{CACHE: cache}).logits[:, -1]
            again = target.prefill(
                check_inputs(target, inputs),
                target.new_cache(batch_size=1, capacity=99, num_slots=1),
                0,
            )
        torch.testing.assert_close(again, logits, atol=1e-5, rtol=0)
        length = inputs["input_ids"].shape[1]
        assert int(prefilled.kv_len[slot]) == length
        for layer, (k, v) in enumerate(zip(prefilled.k, prefilled.v)):
            keys, values = cache.layers[layer].keys[0], cache.layers[layer].values[0]
            torch.testing.assert_close(k[slot, :, :length], keys, atol=2e-5, rtol=0)
            torch.testing.assert_close(v[slot, :, :length], values, atol=2e-5, rtol=0)
            assert not k[slot, :, length:].any()
        video = inputs["input_ids"][0] == target.hf.config.video_token_id
        assert prefilled.visual[slot, :length].bool().equal(video)
        assert not prefilled.visual[slot, length:].any()


@pytest.mark.parametrize(
    "parts, seconds",
    [
        ((3, ("video", 4, 6, 6), 5), 1.0),
        ((2, ("video", 9, 4, 4), 1), 4.0),
        ((2, ("video", 9, 4, 4)), 4.0),
        ((("image", 4, 8), 1, ("video", 3, 4, 4), 1, ("video", 8, 4, 4), 2), 3.0),
        ((2, ("image", 4, 20)), 1.0),
        ((9,), 1.0),
    ],
)
def test_positions_are_those_of_greedy_decoding(target, make_prompt, parts, seconds):
    """What HF's text model is given during HF's own generate, prompt and every step."""
    inputs, seen = make_prompt(*parts, seconds=seconds), []

    def keep(module, args, kwargs):
        seen.append(kwargs["position_ids"][-3:])

    hook = target.text.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        target.hf.generate(**inputs, do_sample=False, max_new_tokens=9, pad_token_id=0)
    finally:
        hook.remove()
    wanted = torch.cat([positions.expand(3, 1, -1) for positions in seen], dim=2)
    length = inputs["input_ids"].shape[1]
    cache = target.new_cache(batch_size=1, capacity=length + 8, num_slots=1)
    with torch.no_grad():
        target.prefill(check_inputs(target, inputs), cache, 0)
    assert wanted.shape[2] == length + 8
    assert cache.positions.equal(wanted)


def test_a_prompt_whose_positions_jump(target, make_prompt, prefilled):
    """The case is real: time goes on beyond where the text resumes."""
    length = int(prefilled.kv_len[1])
    following = prefilled.positions[0, 1, length]
    assert prefilled.positions[0, 1, : length - 2].max() > following + 20


@pytest.mark.parametrize("scores", [False, True])
@torch.no_grad()
def test_tree_step_is_sequential_decoding(target, prompts, prefilled, scores):
    tokens = torch.randint(8, 186, (3, len(TREE)))
    tree = TREE.repeat(3, 1)
    lengths = prefilled.kv_len.tolist()
    before_k, before_v = prefilled.k.clone(), prefilled.v.clone()
    with lvspec_attention_on(target.text):
        output = target.step(
            tokens, depths(TREE), ancestors_from_parents(tree), prefilled, scores=scores
        )
    assert output.logits.shape == (3, len(TREE), 256)
    for sequence, inputs in enumerate(prompts):
        for path in paths(TREE).tolist():
            slots = [slot for slot in path if slot >= 0]
            wanted = _sequential(target, inputs, tokens[sequence, slots].tolist())
            torch.testing.assert_close(
                output.logits[sequence, slots], wanted, atol=1e-5, rtol=0, msg=f"{sequence}, {path}"
            )
    assert prefilled.kv_len.tolist() == lengths
    for tensor, before in ((prefilled.k, before_k), (prefilled.v, before_v)):
        for sequence, length in enumerate(lengths):
            end = length + len(TREE)
            assert tensor[:, sequence, :, :length].equal(before[:, sequence, :, :length])
            assert tensor[:, sequence, :, end:].equal(before[:, sequence, :, end:])
            assert not tensor[:, sequence, :, length:end].equal(before[:, sequence, :, length:end])
    if not scores:
        assert output.masses is None and output.peaks is None
        return
    assert len(output.masses) == len(output.peaks) == 2
    for mass, peak in zip(output.masses, output.peaks):
        assert mass.shape == peak.shape == (3, 4, len(TREE))
        assert (peak[:2] > 0).all() and (peak <= mass).all() and (mass <= 1).all()
        assert not mass[2].any(), "a text has no video"


@torch.no_grad()
def test_step_after_step(target, prompts, prefilled):
    """Two chains, the first accepted in part: rows behind `kv_len` are as if never written."""
    tokens = torch.randint(8, 186, (3, 5))
    chain = ancestors_from_parents(torch.arange(-1, 4).repeat(3, 1))
    with lvspec_attention_on(target.text):
        target.step(tokens, torch.arange(5), chain, prefilled)
        prefilled.kv_len += torch.tensor([1, 3, 5], dtype=torch.int32)
        again = torch.randint(8, 186, (3, 5))
        output = target.step(again, torch.arange(5), chain, prefilled)
    for sequence, (inputs, kept) in enumerate(zip(prompts, (1, 3, 5))):
        emitted = tokens[sequence, :kept].tolist() + again[sequence].tolist()
        wanted = _sequential(target, inputs, emitted)[kept:]
        torch.testing.assert_close(output.logits[sequence], wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_depths_of_every_sequence(target, prompts, prefilled):
    """`[B, S]` depths: each sequence may have another tree."""
    trees = torch.stack([TREE, torch.arange(-1, 6, dtype=torch.int32), TREE])
    tokens = torch.randint(8, 186, (3, len(TREE)))
    with lvspec_attention_on(target.text):
        output = target.step(tokens, depths(trees), ancestors_from_parents(trees), prefilled)
    for sequence, slots in ((0, [0, 2, 5, 6]), (1, list(range(7))), (2, [0, 1, 4])):
        wanted = _sequential(target, prompts[sequence], tokens[sequence, slots].tolist())
        torch.testing.assert_close(output.logits[sequence, slots], wanted, atol=1e-5, rtol=0)
