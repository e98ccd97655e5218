"""The attention implementation "lvspec": without a step it is SDPA, padded batches included."""

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from lvspec import AcceptancePolicy, DecodeConfig, generate
from lvspec.models import attention
from lvspec.models.attention import NAME, lvspec_attention_on
from lvspec.models.model import Model


@pytest.fixture
def text(random_pair):
    """The target's text model, with the implementation it had before the test."""
    model = random_pair[0].model.language_model
    before = model.config._attn_implementation
    yield model
    model.set_attn_implementation(before)


def _batch(side):
    """Two texts of 9 and 5 tokens."""
    ids = torch.randint(8, 186, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_registered_with_both_interfaces():
    assert NAME == "lvspec"
    assert NAME in AttentionInterface().valid_keys()
    assert NAME in AttentionMaskInterface().valid_keys()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batch_without_a_step(random_pair, text, side):
    model, batch = random_pair[0], _batch(side)
    wanted = model(**batch).logits
    text.set_attn_implementation(NAME)
    assert model(**batch).logits.equal(wanted)

    real = batch["attention_mask"][1].bool()
    alone = model(input_ids=batch["input_ids"][1:, real]).logits[0]
    if side == "right":  # left padding also moves the positions of a forward without them
        torch.testing.assert_close(wanted[1, real], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_generation_without_a_step(random_pair, text, side):
    model, batch = random_pair[0], _batch(side)
    wanted = model.generate(**batch, do_sample=False, max_new_tokens=12, pad_token_id=0)
    text.set_attn_implementation(NAME)
    got = model.generate(**batch, do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert got.equal(wanted)


def test_generation_with_a_video_without_a_step(random_pair, text, make_prompt, hf_greedy):
    inputs = make_prompt(3, ("video", 4, 6, 6), 5)
    wanted = hf_greedy(random_pair[0], inputs, 20)
    text.set_attn_implementation(NAME)
    assert hf_greedy(random_pair[0], inputs, 20) == wanted


def test_set_for_a_while(random_pair, text):
    visual = random_pair[0].model.visual.config
    for before in ("sdpa", "eager"):
        text.set_attn_implementation(before)
        with lvspec_attention_on(text):
            assert text.config._attn_implementation == NAME
            assert visual._attn_implementation == "sdpa"
            with lvspec_attention_on(text):  # a target that drafts for itself
                assert text.config._attn_implementation == NAME
            assert text.config._attn_implementation == NAME
        assert text.config._attn_implementation == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_set_back_after_an_error(text, error):
    before = text.config._attn_implementation
    with pytest.raises(error), lvspec_attention_on(text):
        raise error
    assert text.config._attn_implementation == before


@pytest.mark.parametrize(
    "policy, wanted",
    [(AcceptancePolicy.strict(), {False}), (AcceptancePolicy.lvspec(), {False, True})],
)
def test_scores_where_relevance_is_needed(random_pair, make_prompt, monkeypatch, policy, wanted):
    """The draft's passes never need them, the target's do if the policy looks at relevance.

    In float64, where attention is an operation of its own on every machine.
    """
    random_pair = [copy.deepcopy(model).double() for model in random_pair]
    assert all(Model(model, "model").made.plan for model in random_pair), "checked with scores"
    seen, verify_attention = set(), attention.ops.verify_attention

    def recorded(*args, scores, **kwargs):
        seen.add(scores)
        return verify_attention(*args, scores=scores, **kwargs)

    monkeypatch.setattr(attention.ops, "verify_attention", recorded)
    config = DecodeConfig(gamma=3, max_new_tokens=5, eos_ids=(), capture=False)
    generate(*random_pair, make_prompt(8), policy=policy, config=config)
    assert seen == wanted
