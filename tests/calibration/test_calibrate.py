"""calibrate: from clips to a profile; nothing is lost on the way."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig, calibrate
from lvspec.calibration.arguments import metric_for
from lvspec.calibration.calibrate import Calibrating
from lvspec.calibration.candidates import OWN, Candidate
from lvspec.calibration.certificate import Measurement
from lvspec.calibration.fidelity import Fidelity
from lvspec.calibration.replay import Walk
from lvspec.calibration.search import Prediction, _front, _spread
from lvspec.calibration.timing import Pace, measured_speedups
from lvspec.evaluation.samples import Sample
from lvspec.profile import Profile

pytestmark = pytest.mark.filterwarnings("ignore:.*the profile is strict:UserWarning")

CONFIG = DecodeConfig(gamma=4, max_new_tokens=8, eos_ids=())
SAMPLES = [Sample(f"clip-{i}", f"clip-{i}.mp4", "what?") for i in range(6)]


def spelled(tokens, **_):
    return " ".join(str(int(token)) for token in tokens)


class Reader:
    """Stands in for a processor: reads no file, refuses one, and may be interrupted."""

    def __init__(self, make_prompt, interrupted_at=None, broken=()):
        self.make_prompt, self.interrupted_at, self.broken = make_prompt, interrupted_at, broken
        self.calls = 0
        self.tokenizer = SimpleNamespace(decode=spelled, convert_ids_to_tokens=str)

    def __call__(self, video, prompt, **given):
        assert str(given["device"]) == "cpu", "where the target is"
        self.calls += 1
        if self.calls == self.interrupted_at:
            raise KeyboardInterrupt
        if video in self.broken:
            raise ValueError(f"{video}: expected a video, got none")
        seed = int(video.partition("-")[2].partition(".")[0])
        return self.make_prompt(3, ("video", 2, 4, 4), 4, seed=seed, dtype=torch.float64)


@pytest.fixture(scope="module")
def calibrated(pair, make_prompt):
    """`calibrated(folder, **others)`: a calibration that few clips suffice for."""

    def run(folder=None, *, interrupted_at=None, broken=(), **others):
        reader = Reader(make_prompt, interrupted_at, broken)
        given = {"fidelity": 0.3, "metric": "own_chrf", "config": CONFIG, "progress": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a gate that random weights lack
            return calibrate(
                *pair,
                others.pop("samples", SAMPLES),
                processor=reader,
                folder=folder,
                **{**given, **others},
            )

    return run


@pytest.fixture(scope="module")
def whole(calibrated, tmp_path_factory):
    return calibrated(tmp_path_factory.mktemp("whole"))


def test_a_profile_of_what_was_certified(whole, pair, tmp_path):
    profile = whole.profile
    profile.check(*pair)
    assert set(profile.clips) == {sample.id for sample in SAMPLES}
    assert profile.config == {"gamma": 4}
    assert whole.is_certified == profile.fidelity["certified"]
    kept = [each for each in whole.measurements if each.holds]
    kept = [each for each in kept if each.decode_speedup > whole.strict.decode_speedup]
    assert whole.is_certified == bool(kept)
    if kept:
        best = max(kept, key=lambda each: each.decode_speedup)
        assert AcceptancePolicy.from_profile(profile) == best.candidate.policy
        assert profile.fidelity["lower_bound"] >= 0.3 - 1e-5
    profile.write(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json").policy == profile.policy


def test_rows_have_what_was_predicted_and_measured(whole):
    strict, *others = whole.rows()
    assert strict["settings"] == "strict" and others
    assert strict["measured"]["fidelity"] == strict["predicted"]["fidelity"] == 1.0
    assert strict["measured"]["beside"]["own_same"] == 1.0
    assert sum(row["measured"] is not None for row in others) == len(whole.measurements)
    for row in whole.rows():
        assert row["predicted"]["tau"] >= 1 and row["predicted"]["decode_speedup"] > 0


def test_interrupted_anywhere_the_same_command_goes_on(calibrated, whole, tmp_path):
    """What stood there stays, byte for byte; a video serves two captions at most."""
    made, before = 0, []
    for point in (1, 6, 9, 4):
        with pytest.raises(KeyboardInterrupt):
            calibrated(tmp_path, interrupted_at=point)
        lines = (tmp_path / "captions.jsonl").read_text().splitlines()
        assert lines[: len(before)] == before
        assert made + point - 1 <= len(lines) - 1 <= made + 2 * (point - 1)
        made, before = len(lines) - 1, lines
    after = calibrated(tmp_path)
    lines = (tmp_path / "captions.jsonl").read_text().splitlines()
    assert lines[: len(before)] == before
    assert after.made == len(lines) - 1 - made > 0
    assert after.strict.tau == whole.strict.tau
    again = calibrated(tmp_path)
    assert again.made == 0 and again.profile == after.profile


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"fidelity": 0.4}, "fidelity: expected 0.3, with which .* got 0.4"),
        ({"samples": SAMPLES[:5]}, "samples: expected"),
        ({"config": replace(CONFIG, gamma=5)}, "config.gamma: expected 4"),
        ({"metric": "own_same"}, "metric: expected"),
    ],
)
def test_other_settings_in_the_same_folder(calibrated, tmp_path, others, words):
    with pytest.raises(KeyboardInterrupt):
        calibrated(tmp_path, interrupted_at=1)
    with pytest.raises(ValueError, match=words):
        calibrated(tmp_path, **others)


def test_too_few_clips_are_said_and_leave_a_strict_profile(calibrated):
    with pytest.warns(UserWarning, match=r"expected 59 clips or more to certify 0\.95 .* got 2 "):
        few = calibrated(None, fidelity=0.95, metric="own_same", samples=SAMPLES[:4])
    assert not few.is_certified and few.profile.policy["name"] == "strict"
    assert not few.profile.fidelity["certified"] and few.profile.fidelity["clips_needed"] == 59
    # What the candidates do is known all the same.
    assert all(each.clips == 2 for each in (few.strict, *few.measurements))


def test_a_clip_that_cannot_be_read_is_named_and_the_rest_goes_on(calibrated):
    found = calibrated(None, broken=["clip-1.mp4", "clip-4.mp4"])
    assert sorted(found.problems) == ["clip-1", "clip-4"]
    assert "expected a video" in found.problems["clip-1"]
    assert "clip-1" not in found.profile.clips and len(found.profile.clips) == 4
    with pytest.raises(ValueError, match="expected at least two clips that can be captioned"):
        calibrated(None, broken=[sample.video for sample in SAMPLES])


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"samples": SAMPLES[:1]}, "samples: expected at least 2 clips, got 1"),
        ({"samples": SAMPLES[:2] * 2}, "samples: expected ids of which none comes twice"),
        ({"clips": 1}, "clips: expected an integer >= 2, got 1"),
        ({"metric": "nobody"}, "metric: expected module:name"),
        ({"confidence": 1.5}, "confidence: expected a number above 0 and below 1, got 1.5"),
        ({"config": DecodeConfig(temperature=0.5)}, "temperature: expected 0.0"),
        ({"config": DecodeConfig(tree="specvlm")}, "tree: expected None"),
        ({"config": DecodeConfig(scorer=lambda output: None)}, "scorer: expected a name"),
    ],
)
def test_what_is_refused(calibrated, others, words):
    with pytest.raises(ValueError, match=words):
        calibrated(None, **others)


def test_what_multiple_choice_is_measured_by():
    choices = [replace(sample, choices=("red", "blue")) for sample in SAMPLES]
    assert metric_for(choices) == "own_choice"
    assert metric_for([*choices, SAMPLES[0]]) == "anchors"


def test_ngrams_are_refused(pair, make_prompt):
    with pytest.raises(ValueError, match="draft: expected a model or 'self', got 'ngram'"):
        calibrate(pair[0], "ngram", SAMPLES, processor=Reader(make_prompt))


def prediction(fidelity, regret, speed):
    candidate = Candidate(OWN, int(speed))
    return Prediction(candidate, 2.0, speed, speed, regret, fidelity, 0.0)


def test_a_front_is_ordered_from_safe_to_fast():
    safe, slow = prediction(1.0, 0.0, 2.0), prediction(1.0, 0.1, 1.0)
    risky, fast = prediction(0.9, 0.1, 3.0), prediction(0.8, 0.4, 4.0)
    assert _front([fast, slow, risky, safe]) == [safe, risky, fast]
    many = [prediction(1 - i / 100, 0.0, float(i)) for i in range(1, 30)]
    assert [each.decode_speedup for each in _spread(many, 4)] == [1.0, 10.0, 20.0, 29.0]


def timed(tokens, iterations, decode, prefill=1.0):
    return {
        "tokens": [0] * tokens,
        "emitted": tokens - 1,
        "iterations": iterations,
        "decode_s": decode,
        "prefill_s": prefill,
        "seconds": decode + prefill,
    }


def test_speeds_from_what_iterations_cost():
    samples = SAMPLES[:3]
    first = (samples[0], timed(11, 9, 99.0, 99.0))  # what is done once is left out
    alone = [first, *((sample, timed(11, 10, 10.0)) for sample in samples[1:])]
    short = [first, *((sample, timed(11, 5, 10.0, 1.5)) for sample in samples[1:])]
    long = [first, *((sample, timed(11, 2, 8.0, 1.5)) for sample in samples[1:])]
    pace = Pace.of({4: (short, alone), 12: (long, alone)})
    assert pace.iteration(4) == 2.0 and pace.iteration(12) == 4.0 and pace.iteration(8) == 3.0
    walks = [Walk([0] * 31, iterations=5), Walk([0] * 31, iterations=5)]
    decoding, whole = pace.speedups(walks, 8)
    assert decoding == 60 / 30 and whole == (60 + 2) / (30 + 3)
    assert measured_speedups(long, alone) == (10 / 8, 11 / 9.5)


def test_the_profile_is_json(whole, tmp_path):
    whole.profile.write(tmp_path / "a.json")
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["policy"] == whole.profile.to_dict()["policy"]
    assert {"stated", "confidence", "certified", "measured"} <= set(values["fidelity"])


def measurement(policy, speed, holds):
    return Measurement(Candidate(policy, 4), 3, 0.9, 0.5, holds, 2.0, speed, speed, 0.1, {})


@pytest.mark.parametrize(
    ("measured", "chosen", "reason"),
    [
        ([(2.0, True), (3.0, True), (4.0, False)], 3.0, ""),
        ([(2.0, True), (1.0, False)], 2.0, ""),
        ([(2.0, False)], None, "expected 0.3 with confidence 0.95, got 0.9000 on 3 clips"),
        ([(1.2, True)], None, "expected one that is faster than strict, got none"),
        ([], None, "expected one that is faster than strict, got none"),
    ],
)
def test_the_fastest_that_holds_and_is_worth_it(pair, whole, measured, chosen, reason):
    runs = SimpleNamespace(config=CONFIG, target=pair[0], problems={}, made=0)
    models = {"target": whole.profile.target, "draft": whole.profile.draft}
    fidelity = Fidelity("own_same", 0.3, 0.95)
    steps = Calibrating(runs, SAMPLES, fidelity, AcceptancePolicy(strict_ids=(7,)), models)
    found = [
        measurement(AcceptancePolicy.lvspec(max_regret=speed), speed, holds)
        for speed, holds in measured
    ]
    strict = measurement(OWN, 1.5, True)
    predictions = [replace(whole.predictions[0], candidate=m.candidate) for m in (strict, *found)]
    result = steps._result(strict, found, predictions, 3, 10.0)
    assert result.is_certified == (chosen is not None) and reason in result.reason
    policy = AcceptancePolicy.from_profile(result.profile)
    if chosen is None:
        assert policy == AcceptancePolicy.strict(strict_ids=(7,))
    else:
        assert policy.max_regret == chosen
