"""What the command line says of itself: misspelt words, limits in the help, the demo's options."""

import dataclasses
import inspect
import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from lvspec.cli import main
from lvspec.cli.options import CALL_OPTIONS, CONFIG_OPTIONS, POLICY_OPTIONS, by_option, options_of
from lvspec.config import DecodeConfig
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.tasks import TASKS


@pytest.fixture
def said(capsys):
    """`said(*words)`: exit code and the one line on stderr."""

    def run(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return code, err.removeprefix("lvspec: error: ").rstrip("\n")

    return run


@pytest.mark.parametrize(
    ("words", "near", "command"),
    [
        (["genrate"], "generate", "lvspec"),
        (["--verssion"], "--version", "lvspec"),
        (["generate", "--vidoe", "a.mp4", "--prompt", "x"], "--video", "lvspec generate"),
        (
            ["generate", "--video", "a.mp4", "--prompt", "x", "--sede=3"],
            "--seed",
            "lvspec generate",
        ),
        (["demo", "--clps", 3], "--clips", "lvspec demo"),
        (["info", "--jason"], "--json", "lvspec info"),
    ],
)
def test_a_misspelt_word(said, words, near, command):
    code, line = said(*words)
    assert code == 2
    assert f"did you mean {near}?" in line and line.endswith(f"({command} --help explains)")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["swim"], "lvspec"),
        (["--qqqqqq"], "lvspec"),
        (["info", "now"], "lvspec info"),
        (["generate", "--qqqqqq"], "lvspec generate"),
        (["generate", "--prompt", "x"], "lvspec generate"),
    ],
)
def test_where_nothing_is_near_nothing_is_guessed(said, words, command):
    code, line = said(*words)
    assert code == 2 and "did you mean" not in line
    assert line.endswith(f"({command} --help explains)")


def test_the_beginning_of_an_option_is_one(capsys):
    assert main(["info", "--js"]) == 0
    assert "versions" in json.loads(capsys.readouterr().out)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lvspec {metadata.version('lvspec')}\n"


def test_every_option_of_another_name():
    """Of the fields that a command line sets, each is named by its option."""
    fields = {field.name for field in dataclasses.fields(DecodeConfig)}
    assert {name.removeprefix("sample_") for name in CONFIG_OPTIONS} <= fields
    assert CALL_OPTIONS["top_p"] == "--sample-top-p" and CALL_OPTIONS["top_k"] == "--sample-top-k"
    assert options_of(POLICY_OPTIONS)["top_k"] == "--top-k"
    for field in CALL_OPTIONS:
        assert by_option(f"{field}: expected this, got {field}", CALL_OPTIONS) == (
            f"{CALL_OPTIONS[field]}: expected this, got {field}"
        )


def test_only_what_a_message_is_about_is_renamed():
    names = {"gamma": "--gamma", "seed": "--seed"}
    assert by_option("gamma, seed: expected x", names) == "--gamma, --seed: expected x"
    assert by_option("gamma + tree.nodes: expected x", names) == "--gamma + tree.nodes: expected x"
    for kept in ("clips/gamma.mp4: expected gamma", "the gamma: x", "my-gamma: expected x"):
        assert by_option(kept, names) == kept


def test_help_says_the_limits_of_policy_fields(capsys):
    """As the docstring of the policy, whose checks they are."""
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    page = " ".join(capsys.readouterr().out.split())
    entries = dict(re.findall(r"--([a-z-]+) [XN] (.*?)(?= --[a-z-]+ [XNW]|$)", page))
    policy = AcceptancePolicy(anchor_threshold=1.0)
    for field, (kind, _) in POLICY_OPTIONS.items():
        if field == "anchor_threshold":
            continue
        found = entries[field.replace("_", "-")]
        assert re.search(r"\d to \d+|>= \d|above 0", found), field
        limit = re.search(r"(\d+) to (\d+)", found)
        if kind is int and limit:
            for number in map(int, limit.groups()):
                dataclasses.replace(policy, **{field: number})
            with pytest.raises(ValueError, match=field):
                dataclasses.replace(policy, **{field: int(limit[2]) + 1})
    assert "1 to 16" in inspect.getdoc(AcceptancePolicy) and "1 to 16" in entries["top-k"]


@pytest.fixture
def nothing_made(monkeypatch):
    """The demo does nothing behind its checks."""

    def load(*_, **__):
        raise AssertionError("models are loaded")

    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, dataclasses.replace(task, load=load))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "clip.mp4"], "--out: expected a folder, got clip.mp4: a file"),
        (["--out", "clip.mp4/more"], "--out: expected a folder, got clip.mp4/more: Not a dir"),
        (["--json", "none/rows.json"], "--json: expected a name in an existing folder"),
        (["--json", "."], "--json: expected the name of a file, got the folder ."),
        (["--gamma", 64], "--gamma: expected an integer from 1 to 63, got 64"),
        (["--clips", 0], "--clips: expected at least 1, got 0"),
        (["--threads", 0], "--threads: expected at least 1, got 0"),
        (["--pair", "ideal"], "--pair: expected embedded or real, got ideal"),
    ],
)
def test_the_demo_refuses_before_it_works(
    said, nothing_made, tmp_path, monkeypatch, options, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").touch()
    code, line = said("demo", *options)
    assert code == 2 and line.startswith(words)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_the_demo_of_the_makefile_is_not_refused(said, nothing_made, tmp_path, monkeypatch):
    """Its rows stand in the folder that it makes for its clips, which a fresh clone has not."""
    monkeypatch.chdir(tmp_path)
    makefile = Path(__file__).resolve().parents[2] / "Makefile"
    (words,) = re.findall(r"^demo:.*\n\t.*?/lvspec demo (.*)$", makefile.read_text(), re.MULTILINE)
    code, line = said("demo", *words.split())
    assert code == 1 and "models are loaded" in line
    assert [path.name for path in tmp_path.iterdir()] == ["demo-out"]
