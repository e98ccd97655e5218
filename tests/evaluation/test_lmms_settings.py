"""What lmms-eval says to lvspec in words and numbers; lmms-eval itself is in test_lmms.py."""

import math

import pytest

from lvspec import AcceptancePolicy, DecodeConfig
from lvspec.evaluation.lmms_settings import (
    Settings,
    Tally,
    batch_size_of,
    frames_of,
    policy_of,
    profile_of,
    refuse_unknown,
)

BASE = DecodeConfig(gamma=5)
WHERE = "videos, document 7"


def test_a_task_that_says_nothing_is_greedy():
    assert Settings.of({}, WHERE).config(BASE) == BASE
    assert Settings.of({"until": None, "top_p": None, "temperature": 0}, WHERE) == Settings()


def test_settings_of_a_task():
    given = {"until": "\n\n", "max_new_tokens": 9, "temperature": 0.5, "top_k": 4, "top_p": 0.9}
    settings = Settings.of({**given, "num_beams": 1, "do_sample": True}, WHERE)
    assert settings == Settings(("\n\n",), 9, 0.5, 4, 0.9)
    config = settings.config(BASE)
    assert (config.gamma, config.max_new_tokens) == (5, 9)
    assert (config.temperature, config.top_k, config.top_p) == (0.5, 4, 0.9)


@pytest.mark.parametrize(
    "greedy", [{"temperature": 0.0}, {}, {"temperature": 0.7, "do_sample": False}]
)
def test_top_k_and_top_p_mean_nothing_without_a_temperature(greedy):
    assert Settings.of({"top_p": 1.0, "top_k": 3, **greedy}, WHERE).config(BASE) == BASE


def test_what_a_task_sets_in_vain_is_known():
    given = {"until": [], "image_aspect_ratio": "original", "repetition_penalty": None, "top_p": 1}
    assert Settings.unread(given) == {"image_aspect_ratio"}


@pytest.mark.parametrize(
    ("until", "answer"),
    [((), "a. b"), (("b",), "a."), ((".", "b"), "a"), (("a",), ""), (("\n",), "a. b")],
)
def test_an_answer_ends_before_the_first_string(until, answer):
    assert Settings(until).cut(" a. b\n") == answer


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, f"{WHERE}: num_beams: expected 1, got 4"),
        ({"until": ["a", ""]}, f"{WHERE}: until: expected non-empty strings, got ''"),
        ({"until": 3}, f"{WHERE}: until: expected non-empty strings, got 3"),
    ],
)
def test_settings_that_cannot_be_met(given, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        Settings.of(given, WHERE)
    assert str(caught.value) == message


def bad(function, *arguments):
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*arguments)
    return str(caught.value)


def test_arguments_that_mean_something():
    assert policy_of(None) is None
    assert policy_of("strict") == AcceptancePolicy.strict()
    assert frames_of(None, None) == {}
    assert frames_of(8, None) == {"num_frames": 8} and frames_of(None, 0.5) == {"fps": 0.5}
    assert batch_size_of(2) == batch_size_of("2") == 2
    refuse_unknown({}, bad)


def test_arguments_that_do_not():
    presets = "strict, lvspec, fly, typical, relaxed, random_relaxation"
    assert bad(policy_of, "loose") == f"policy: expected one of {presets}, got 'loose'"
    both = "num_frames, fps: expected one of them, got num_frames=8 and fps=2"
    assert bad(frames_of, 8, 2) == both
    assert bad(frames_of, 1, None) == "num_frames: expected an integer >= 2, got 1"
    assert bad(frames_of, "many", None) == "num_frames: expected an integer, got 'many'"
    assert bad(frames_of, None, 0) == "fps: expected a number > 0, got 0"
    assert bad(frames_of, None, math.nan).startswith("fps: expected a number > 0")
    assert bad(batch_size_of, "auto") == "batch_size: expected an integer, got 'auto'"
    assert bad(batch_size_of, "0") == "batch_size: expected an integer >= 1, got 0"

    def model(self, fps=None, draft=None, **unknown): ...

    message = "model_args: expected names among draft, fps, got frames, max_pixels"
    assert bad(refuse_unknown, {"max_pixels": 1, "frames": 2}, model) == message


def test_a_profile_stands_alone(tmp_path):
    assert profile_of(None, policy="strict", gamma=3) is None
    said = bad(lambda: profile_of("p.json", policy=None, gamma=3))
    assert said == "gamma: expected none beside profile, which says it, got 3"
    (tmp_path / "p.json").write_text("[]")
    assert bad(profile_of, str(tmp_path / "p.json")).startswith("profile: expected a file that")


class Stats:
    num_emitted, num_iterations, num_passed, num_drafted, regret = 20, 4, 16, 20, 0.5


def test_tally_weighs_passes_not_captions():
    tally = Tally()
    assert math.isnan(tally.tau) and tally.metrics() == {}
    tally.add(Stats, 21)
    other = type("Other", (Stats,), {"num_emitted": 4, "num_iterations": 2, "regret": 0.0})
    tally.add(other, 4)
    assert tally.tau == 4 and tally.tokens == 25
    assert tally.metrics() == {"tau": 4, "acceptance_rate": 32 / 40, "regret_per_token": 0.02}
