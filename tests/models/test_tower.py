"""One vision tower in two models: when it is the same, and that it then looks once."""

import copy

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig, Decoder, generate
from lvspec.models.model import Model
from lvspec.models.tower import SharedTower

CLIP = (3, ("video", 2, 6, 4), 5)
CONFIG = DecodeConfig(gamma=3, max_new_tokens=12, eos_ids=())


@pytest.fixture
def family_of_two(random_pair):
    """(target, draft): the draft is the target without its last layer, a copy of every weight."""
    target = copy.deepcopy(random_pair[0]).double()
    draft = copy.deepcopy(target)
    text = draft.model.language_model
    text.layers = text.layers[:1]
    text.config.num_hidden_layers = 1
    text.config.layer_types = text.config.layer_types[:1]
    return target, draft


def calls_of(model, monkeypatch):
    """A list that grows with every pass of the patches through the model's tower."""
    calls, patches = [], model.model.visual.patch_embed
    kind = type(patches)
    forward = kind.forward

    def counted(self, *args):
        if self is patches:
            calls.append(args)
        return forward(self, *args)

    monkeypatch.setattr(kind, "forward", counted)
    return calls


def decode(target, draft, inputs, **options):
    return generate(
        target, draft, inputs, policy=AcceptancePolicy.strict(), config=CONFIG, **options
    )


def difference(target, draft):
    return SharedTower(Model(target, "target"), Model(draft, "draft")).difference()


def test_what_the_target_saw_is_not_computed_again(family_of_two, make_prompt, monkeypatch):
    target, draft = family_of_two
    inputs = make_prompt(*CLIP, dtype=torch.float64)
    alone = copy.deepcopy(draft)
    with torch.no_grad():
        alone.model.visual.merger.mlp[2].bias += 0  # written to, and the same all the same
    seen, seen_again = calls_of(target, monkeypatch), calls_of(draft, monkeypatch)
    found = decode(target, draft, inputs)
    assert (len(seen), len(seen_again)) == (1, 0)
    assert found.stats.draft_vision == "the target's" == found.stats.to_dict()["draft_vision"]
    with monkeypatch.context() as patch:
        patch.setattr("lvspec.models.tower._other_values", lambda *weights: "not asked")
        own = decode(target, alone, inputs)
    assert own.stats.draft_vision == "its own: not asked" and len(seen) == 2
    assert torch.equal(found.tokens, own.tokens)
    assert found.stats.num_accepted == own.stats.num_accepted and found.stats.tau > 1


def test_a_tower_that_is_one_module_looks_once(family_of_two, make_prompt, monkeypatch):
    target, draft = family_of_two
    draft.model.visual = target.model.visual
    seen = calls_of(target, monkeypatch)
    found = decode(target, draft, make_prompt(*CLIP, dtype=torch.float64))
    assert len(seen) == 1 and found.stats.draft_vision == "the target's"


def test_other_weights_are_seen_whenever_they_come(family_of_two, make_prompt, monkeypatch):
    target, draft = family_of_two
    inputs = make_prompt(*CLIP, dtype=torch.float64)
    decoder = Decoder(target, draft, AcceptancePolicy.strict(), CONFIG)
    seen_again = calls_of(draft, monkeypatch)
    weight = draft.model.visual.blocks[0].attn.qkv.weight
    expected = []

    def look():
        found = decoder.generate(inputs)
        expected.append(found.stats.draft_vision)
        assert found.tokens.tolist() == first.tokens.tolist()
        return len(seen_again)

    first = decoder.generate(inputs)
    assert first.stats.draft_vision == "the target's" and seen_again == []
    with torch.no_grad():
        weight[0, 0] += 1  # one number of one weight
    assert look() == 1
    with torch.no_grad():
        weight.copy_(target.model.visual.blocks[0].attn.qkv.weight)
    assert look() == 1
    weight.data *= 1.5  # as adapters are merged: no count of writings tells
    assert look() == 2
    words = "its own: its weights are others than the target's"
    assert expected[0].startswith(f"{words} (blocks.0.attn.qkv.weight)")
    assert expected[1] == "the target's" and expected[2].startswith(words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tower: tower.float(), "is (torch.float32, "),
        (lambda tower: tower.train(), "is in training mode"),
        (lambda tower: tower.register_forward_hook(lambda *_: None), "has hooks"),
        (lambda tower: setattr(tower.config, "hidden_act", "relu"), "its hidden_act is relu"),
        (lambda tower: setattr(tower.config, "_attn_implementation", "eager"), "its attention is"),
        (lambda tower: tower.blocks.pop(0), "only one of the towers has blocks."),
        (lambda tower: setattr(tower, "forward", tower.forward), "has another forward than its"),
    ],
)
def test_why_towers_are_not_the_same(family_of_two, change, words):
    target, draft = family_of_two
    assert difference(target, draft) is None
    change(draft.model.visual)
    assert words in difference(target, draft)


def test_what_was_shown_to_the_draft_alone_is_computed(family_of_two, make_prompt):
    target, draft = family_of_two
    inputs = make_prompt(*CLIP, dtype=torch.float64)
    other = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"] + 1}
    found = decode(target, draft, inputs, draft_inputs=other)
    assert found.stats.draft_vision == "its own: it was shown something else than the target"
    equal = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].clone()}
    assert decode(target, draft, inputs, draft_inputs=equal).stats.draft_vision == "the target's"


def test_nothing_is_said_where_nothing_is_seen(family_of_two, make_prompt):
    target, draft = family_of_two
    inputs = make_prompt(*CLIP, dtype=torch.float64)
    text = {"input_ids": inputs["input_ids"][:, -3:]}
    assert decode(target, draft, text).stats.draft_vision is None
    assert decode(target, "self", inputs).stats.draft_vision is None
    assert "forward" not in vars(target.model.visual) and "forward" not in vars(draft.model.visual)
