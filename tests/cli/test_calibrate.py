"""`lvspec calibrate`, and profiles in `lvspec generate`."""

import json

import pytest
import torch

from lvspec.cli import main
from lvspec.video import write_video

NAMES = [f"{name}.mp4" for name in "abcdef"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for index, name in enumerate(NAMES):
        write_video(
            folder / name, torch.full((8, 84, 84, 3), 40 * index, dtype=torch.uint8), fps=4
        )
    return folder


@pytest.fixture(scope="module")
def models(random_pair_folders):
    target, draft = map(str, random_pair_folders)
    return ["--target", target, "--draft", draft]


@pytest.fixture
def lvspec(capsys, monkeypatch, tmp_path):
    """`lvspec(*words)`: (exit code, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def options(models):
    return [*models, "--max-new-tokens", "6", "--gamma", "3", "--metric", "own_chrf"]


def profile_of(folder):
    return json.loads((folder / "profile.json").read_text())


def test_a_folder_to_a_profile_to_captions(lvspec, options, models, videos, tmp_path):
    words = ["calibrate", "--videos", videos, "--prompt", "describe the video.", *options]
    code, out, err = lvspec(*words, "--fidelity", "0.3")
    profile = profile_of(tmp_path)
    assert code == (0 if profile["fidelity"]["certified"] else 1), err
    table, _, beside = out.partition("the profile by other metrics: ")
    assert max(map(len, table.splitlines())) <= 80 and "own_rouge_l" in beside
    assert "measured on 3" in out and "own_chrf: 0.3 with confidence 0.95" in out
    assert sorted(profile["clips"]) == NAMES and profile["config"] == {"gamma": 3}
    # The same command again has nothing left to do.
    kept = (tmp_path / "profile.json.work" / "captions.jsonl").read_bytes()
    assert lvspec(*words, "--fidelity", "0.3")[0] == code
    assert (tmp_path / "profile.json.work" / "captions.jsonl").read_bytes() == kept
    assert profile_of(tmp_path)["figures"] == profile["figures"]
    code, _, err = lvspec(*words, "--fidelity", "0.4")
    assert code == 2 and "--fidelity: expected 0.3, with which" in err

    caption = ["generate", "--video", videos / "a.mp4", "--prompt", "describe.", "--json", "a.json"]
    caption += ["--max-new-tokens", "6", "--profile", "profile.json"]
    code, _, err = lvspec(*caption, *models)
    assert (code, err) == (0, "")
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["policy"] == profile["policy"] and written["config"]["gamma"] == 3
    # The draft as target is another pair.
    code, _, err = lvspec(*caption, "--target", models[3], "--draft", models[1])
    assert code == 2 and "--profile: expected the target that it was made for" in err


def test_what_is_wrong_with_a_manifest_is_named_and_the_rest_goes_on(
    lvspec, options, videos, tmp_path
):
    lines = [json.dumps({"video": str(videos / name), "prompt": "what?"}) for name in NAMES[:5]]
    lines.insert(1, '{"video": "gone.mp4", "prompt": "what?"}')
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    lines.append('{"video": "broken.mp4", "prompt": "what?"}')
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    words = ["calibrate", "--manifest", "manifest.jsonl", *options, "--fidelity", "0.2"]
    code, _, err = lvspec(*words)
    assert code == 1
    assert "manifest.jsonl, line 2: video: expected a file, got gone.mp4" in err
    assert "broken.mp4" in err.splitlines()[-2] or "broken.mp4" in err
    assert len(profile_of(tmp_path)["clips"]) == 5


@pytest.mark.slow
def test_too_few_clips_are_said(lvspec, options, videos, tmp_path):
    words = ["calibrate", "--videos", videos, "--prompt", "describe.", *options, "--clips", "4"]
    code, _, err = lvspec(*words)
    assert code == 1 and "clips or more to certify 0.998 with confidence 0.95, got 2" in err
    assert profile_of(tmp_path)["policy"]["name"] == "strict"


def test_interrupted(lvspec, options, videos, tmp_path, monkeypatch):
    from lvspec.calibration.runs import Runs

    caption, count = Runs._caption, iter(range(5))

    def interrupted(*arguments):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return caption(*arguments)

    monkeypatch.setattr(Runs, "_caption", interrupted)
    words = ["calibrate", "--videos", videos, "--prompt", "describe.", *options]
    code, _, err = lvspec(*words)
    assert code == 130 and "every caption is in profile.json.work" in err
    lines = (tmp_path / "profile.json.work" / "captions.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--videos", "none"], "--prompt: expected a text beside --videos"),
        (["--videos", "none", "--prompt", "what?"], "--videos: expected a folder, got none"),
        (["--manifest", "none.jsonl"], "--manifest: expected a file that can be read"),
        (["--manifest", "m", "--prompt", "what?"], "--prompt: expected --videos beside it"),
        (["--manifest", "m", "--fidelity", "1"], "--fidelity: expected a number above 0 and below"),
        (["--manifest", "m", "--confidence", "0"], "--confidence: expected a number above 0"),
        (["--manifest", "m", "--clips", "1"], "--clips: expected at least 2, got 1"),
        (["--manifest", "m", "--target", "t"], "--draft: expected one beside --target t"),
        (["--manifest", "m", "--target", "t", "--draft", "ngram"], "--draft: expected a model or"),
        (["--manifest", "m", "--json", "none/a.json"], "--json: expected a name in an existing"),
        ([], "one of the arguments --videos --manifest is required"),
    ],
)
def test_bad_input_is_named(lvspec, words, message):
    code, _, err = lvspec("calibrate", *words)
    assert code == 2 and message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "strict"], "--policy: expected none beside --profile"),
        (["--max-regret", "1"], "--max-regret: expected none beside --profile"),
        (["--gamma", "4"], "--gamma: expected none beside --profile"),
        (["--no-draft"], "--no-draft: expected a draft beside --profile"),
        ([], "--profile: expected a file that lvspec calibrate wrote, got profile.json: No such"),
    ],
)
def test_what_contradicts_a_profile(lvspec, words, message):
    code, _, err = lvspec(
        *("generate", "--video", "a.mp4", "--prompt", "what?", "--profile", "profile.json"), *words
    )
    assert code == 2 and message in err


def test_a_profile_of_another_version(lvspec, tmp_path):
    (tmp_path / "profile.json").write_text('{"lvspec": "profile", "version": 9}')
    code, _, err = lvspec(
        *("generate", "--video", "a.mp4", "--prompt", "what?", "--profile", "profile.json")
    )
    assert code == 2 and "--profile: expected version 1" in err
