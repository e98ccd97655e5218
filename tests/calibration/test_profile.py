"""Profiles: files that say what was calibrated, for whom, and that are refused by anybody else."""

import copy
import json

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig, custom_generate, generate
from lvspec.profile import Profile, identity

POLICY = AcceptancePolicy(anchor_threshold=0.12, top_k=16, shift_window=2, name="calibrated")


@pytest.fixture(scope="module")
def profile(pair):
    target, draft = map(identity, pair)
    return Profile(target, draft, POLICY.to_dict(), {"gamma": 3}, clips=("a", "b"))


def test_a_file_holds_all_of_it(profile, tmp_path):
    profile.write(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json") == profile
    values = json.loads((tmp_path / "profile.json").read_text())
    assert (values["lvspec"], values["version"]) == ("profile", 1)
    assert Profile.read(values) == Profile.read(profile) == profile
    for source in (str(tmp_path / "profile.json"), values, profile):
        assert AcceptancePolicy.from_profile(source) == POLICY


def test_infinities_survive(profile, tmp_path):
    policy = AcceptancePolicy.relaxed()  # without a gate: a threshold of infinity
    Profile(profile.target, profile.draft, policy.to_dict()).write(tmp_path / "a.json")
    assert AcceptancePolicy.from_profile(tmp_path / "a.json") == policy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "expected version 1, .* got version 2"),
        ({"lvspec": "evaluation"}, "wrote, got a mapping with a evaluation of lvspec"),
        ({"lvspec": None}, "expected a file that lvspec calibrate wrote"),
    ],
)
def test_what_is_no_profile_of_this_version(profile, change, words):
    with pytest.raises(ValueError, match=words):
        AcceptancePolicy.from_profile({**profile.to_dict(), **change})


def test_what_is_missing(profile, tmp_path):
    values = profile.to_dict()
    del values["policy"]
    with pytest.raises(ValueError, match="expected policy in it"):
        Profile.read(values)
    with pytest.raises(FileNotFoundError, match=r"profile: expected a file .*none\.json"):
        Profile.read(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"lvspec": "pro')
    with pytest.raises(ValueError, match=r"torn\.json, which is no JSON"):
        Profile.read(tmp_path / "torn.json")


def test_the_pair_it_was_made_for(profile, pair, random_pair):
    target, draft = pair
    profile.check(target, draft)
    # In another dtype it is the same pair; with another draft, or the two the wrong way, it is not.
    profile.check(copy.deepcopy(target).bfloat16(), draft)
    assert AcceptancePolicy.from_profile(profile, target, draft) == POLICY
    with pytest.raises(ValueError, match="profile: expected the draft that it was made for"):
        AcceptancePolicy.from_profile(profile, target, random_pair[1])
    with pytest.raises(ValueError, match="expected the draft .* got ngram"):
        profile.check(target, "ngram")
    with pytest.raises(ValueError, match="expected the target that it was made for"):
        profile.check(random_pair[1], draft)


def test_weights_tell_models_apart(pair):
    target = copy.deepcopy(pair[0])
    before = identity(target)
    with torch.no_grad():  # the same architecture, trained on
        for weight in target.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.01)
    after = identity(target)
    assert after["config_hash"] == before["config_hash"]
    assert after["weights_hash"] != before["weights_hash"]
    with pytest.raises(ValueError, match=rf"weights {before['weights_hash'][:8]}"):
        Profile(before, identity("self"), POLICY.to_dict()).check(target, "self")


def test_a_draft_without_weights_has_a_name():
    assert identity("self") == {"name": "self", "config_hash": None, "weights_hash": None}
    profile = Profile(identity("self"), identity("self"), POLICY.to_dict())
    profile.check("self", "self")
    with pytest.raises(ValueError, match="that it was made for, self, got ngram"):
        profile.check("self", "ngram")


def test_custom_generate_takes_a_profile(pair, profile, make_prompt):
    target, draft = pair
    inputs = make_prompt(3, ("video", 4, 6, 6), 5, dtype=torch.float64)
    given = {"draft_model": draft, "draft_inputs": inputs, "custom_generate": custom_generate}
    given |= {"max_new_tokens": 20, "pad_token_id": 0}
    said = target.generate(**inputs, **given, lvspec_profile=profile.to_dict())
    config = DecodeConfig(gamma=3, max_new_tokens=20)
    expected = generate(target, draft, inputs, policy=POLICY, config=config)
    assert said.tolist() == expected.sequences.tolist()
    assert expected.stats.counts["loose"] > 0  # strict would say something else
    with pytest.raises(ValueError, match="lvspec_policy: expected none with lvspec_profile"):
        target.generate(**inputs, **given, lvspec_profile=profile, lvspec_policy=POLICY)
    with pytest.raises(ValueError, match="expected gamma at its default with lvspec_profile"):
        config = DecodeConfig(gamma=5)
        target.generate(**inputs, **given, lvspec_profile=profile, lvspec_config=config)
    with pytest.raises(ValueError, match="expected the draft that it was made for"):
        given["draft_model"] = target
        target.generate(**inputs, **given, lvspec_profile=profile)
