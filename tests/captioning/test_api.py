"""lvspec.caption: the command's meaning, from Python."""

import json

import pytest
from noise import write_noise

import lvspec
from lvspec.captioning.shards import lines_of
from lvspec.cli import main
from lvspec.profile import Profile, identity

PROMPT = "describe the video."


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = write_noise(tmp_path_factory.mktemp("videos"), 2)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def loaded(random_pair_folders):
    return lvspec.load_pair(*random_pair_folders, device="cpu")


def captioned(loaded, samples, **given):
    config = lvspec.DecodeConfig(gamma=2, max_new_tokens=4)
    given = {"config": config, "num_frames": 2, "processor": loaded.processor, **given}
    return lvspec.caption(loaded.target, loaded.draft, samples, **given)


def rows(path):
    """Without what no two runs have alike."""
    found = {row["id"]: row for _, row in lines_of(path)}
    assert all((row.pop("seconds") is None) == (row["error"] is not None) for row in found.values())
    return found


@pytest.mark.slow
def test_it_is_the_command(videos, loaded, random_pair_folders, tmp_path, capsys):
    """The same rows, and either goes on where the other was."""
    seen = []
    options = {"prompt": PROMPT, "on_row": lambda row: seen.append(row["id"])}
    done = captioned(loaded, videos, out=tmp_path / "ours", **options)
    assert (done.total, done.skipped, done.left) == (3, 0, 0)
    assert sorted(seen) == ["0.mp4", "1.mp4", "broken.mp4"]
    target, draft = map(str, random_pair_folders)
    command = ["caption", "--videos", str(videos), "--prompt", PROMPT, "--target", target]
    command += ["--draft", draft, "--max-new-tokens", "4", "--gamma", "2", "--num-frames", "2"]
    command += ["--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "ours")]) == 0
    assert "0 captions | 0 failed | 3 were there" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "theirs")]) == 1
    theirs = tmp_path / "theirs" / done.path.name
    assert rows(done.path) == rows(theirs)
    again = captioned(loaded, videos, out=theirs.parent, **options)
    assert (again.skipped, again.left, again.path) == (3, 0, theirs)


def test_a_manifest_and_a_part_of_it(videos, loaded, tmp_path):
    """One of its lines is none; the part has no sample, so there is nothing to do."""
    manifest = videos / "manifest.jsonl"
    lines = [json.dumps({"video": "0.mp4", "prompt": "what?"}), "{"]
    manifest.write_text("\n".join(lines))
    shards = [f"{index}/2" for index in (1, 2)]
    should_stop = {"should_stop": lambda: True}
    done = [captioned(loaded, manifest, out=tmp_path, shard=s, **should_stop) for s in shards]
    assert sorted((each.total, each.left) for each in done) == [(0, 0), (1, 1)]
    (problem,) = done[0].problems
    assert "line 2: expected a JSON object" in str(problem)


def test_a_profile_is_followed(videos, loaded, tmp_path):
    policy = lvspec.AcceptancePolicy.strict()
    models = map(identity, (loaded.target, loaded.draft))
    profile = Profile(*models, policy.to_dict(), {"gamma": 5, "draft_keep": 0.5})
    given = {"out": tmp_path, "prompt": PROMPT, "should_stop": lambda: True}
    captioned(loaded, videos, profile=profile, **given)
    settings = json.loads((tmp_path / "settings.json").read_text())["settings"]
    assert settings["policy"] == policy.to_dict() and settings["config"]["gamma"] == 5
    assert settings["config"]["draft_keep"] == 0.5 and settings["config"]["max_new_tokens"] == 4
    with pytest.raises(ValueError, match="^policy, profile: expected one of them, got both"):
        captioned(loaded, videos, profile=profile, policy=policy, **given)
    other = Profile(identity("ngram"), identity(loaded.draft), policy.to_dict())
    with pytest.raises(ValueError, match="^profile: expected the target that it was made for"):
        captioned(loaded, videos, profile=other, **given)


class Unpickled:
    def __reduce__(self):
        raise RuntimeError("it holds a file")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"prompt": None}, ValueError, "^prompt: expected a text beside a folder"),
        ({"processor": Unpickled()}, TypeError, "^processor: expected one that pickle takes"),
        ({"clip_timeout": 0}, ValueError, "^clip_timeout: expected seconds > 0, got 0"),
        ({"shard": "3/2"}, ValueError, "^shard: expected I/N with I from 1 to N, got 3/2"),
        ({"samples": []}, ValueError, "^samples: expected at least one, got none"),
        ({"samples": ["a.mp4"]}, TypeError, "^samples: expected Sample, got 'a.mp4'"),
    ],
)
def test_wrong_arguments_are_refused(videos, loaded, tmp_path, wrong, error, message):
    given = {"samples": videos, "out": tmp_path / "out", "prompt": PROMPT, **wrong}
    with pytest.raises(error, match=message):
        captioned(loaded, given.pop("samples"), **given)
    assert not (tmp_path / "out").exists()
