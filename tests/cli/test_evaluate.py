"""lvspec evaluate: what it prints, what it leaves, and what it says of bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import transformers
from noise import write_noise
from packaging.version import Version

from lvspec.cli import main
from lvspec.evaluation import datasets


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("videos"), 3)


@pytest.fixture
def manifest(videos):
    """`manifest(line, ...)`: a manifest beside the videos; objects become JSON."""

    def write(*lines):
        path = videos / "manifest.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts) + "\n")
        return str(path)

    return write


@pytest.fixture
def evaluate(random_pair_folders, tmp_path):
    """`evaluate(option, ...)`: the exit code of the command for the random pair."""
    target, draft = map(str, random_pair_folders)
    fixed = [
        "--target",
        target,
        "--draft",
        draft,
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    fixed += ["--max-new-tokens", "6", "--gamma", "3"]

    def run(*options):
        return main(["evaluate", *fixed, *options])

    return run


def rows(text):
    """The table: {method: cells}."""
    found = re.findall(r"^ *([a-z]+(?:-[a-z]+)?) +([\d.-]+ .*)$", text, flags=re.MULTILINE)
    return {name: cells.split() for name, cells in found}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="HF's, with an assistant whose vocabulary is padded differently, fails on a video",
)
def test_a_table_of_eighty_columns(evaluate, videos, tmp_path, capsys):
    code = evaluate("--videos", str(videos), "--prompt", "describe the video .", "--clips", "2")
    said = capsys.readouterr()
    assert code == 0 and said.err == ""
    assert max(map(len, said.out.splitlines())) <= 80 and "…" not in said.out
    first, scores = re.split(r"^ +scores +$", said.out, flags=re.MULTILINE)
    found = rows(first)
    names = "autoregression hf-generate hf-assisted strict specvlm fly random lvspec".split()
    assert list(found) == names and list(rows(scores)) == names
    assert found["strict"][1][-1] == "x" and found["hf-assisted"][2] == "-"
    assert (
        "speed-up over autoregression" in said.out and "chrF against the target's own" in said.out
    )
    assert "judge: none (--judge-url); the scores are those that need none" in said.out
    assert f"{tmp_path / 'out' / 'records.jsonl'}" in said.out.replace("\n", "")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["method"] for row in summary["rows"]] == names
    assert summary["problems"] == [] and summary["environment"]["threads"] == 1


def test_a_bad_line_is_named_and_the_rest_goes_on(evaluate, manifest, tmp_path, capsys):
    good = {"video": "0.mp4", "prompt": "what ?"}
    path = manifest(good, {"video": "9.mp4", "prompt": "what ?"}, "{", {**good, "prompt": " "})
    code = evaluate("--manifest", path, "--methods", "autoregression", "strict")
    said = capsys.readouterr()
    assert code == 1
    assert said.err.splitlines() == [
        f"lvspec: error: {path}, line 2: video: expected a file, got 9.mp4: no such file",
        f"lvspec: error: {path}, line 3: expected a JSON object, got {{: Expecting property name "
        "enclosed in double quotes: line 1 column 2 (char 1)",
        f"lvspec: error: {path}, line 4: prompt: expected a text, got an empty one",
    ]
    assert list(rows(said.out))[:2] == ["autoregression", "strict"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["problems"]) == 3 and summary["rows"][0]["captions"] == 1
    # Mended, the same command does what is new.
    path = manifest(good, {"video": "1.mp4", "prompt": "what ?"})
    assert evaluate("--manifest", path, "--methods", "autoregression", "strict") == 0
    assert "2 samples" in capsys.readouterr().out


def test_nothing_that_is_whole(evaluate, manifest, capsys):
    path = manifest(*[{"video": f"{number}.avi", "prompt": "?"} for number in range(30)])
    assert evaluate("--manifest", path) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 22 and lines[20] == "lvspec: error: and 10 more, all in the summary"
    assert lines[21] == (
        "lvspec: error: --manifest, --videos, --dataset: expected at least one that is whole, "
        "got none"
    )


def test_a_video_that_is_none(evaluate, videos, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"none")
    (tmp_path / "good.mp4").write_bytes((videos / "0.mp4").read_bytes())
    asked = ("--videos", str(tmp_path), "--prompt", "what ?", "--methods", "autoregression")
    assert evaluate(*asked) == 1
    said = capsys.readouterr().err
    assert said.startswith("lvspec: error: autoregression: 1 of 2 captions failed: ")
    assert "broken.mp4" in said


def test_another_folder_is_refused(evaluate, videos, capsys):
    asked = ("--videos", str(videos), "--prompt", "what ?", "--clips", "1")
    assert evaluate(*asked, "--methods", "autoregression") == 0
    capsys.readouterr()
    assert evaluate(*asked, "--methods", "autoregression", "--num-frames", "4") == 2
    said = capsys.readouterr().err
    assert said.startswith("lvspec: error: frames.num_frames: expected none, with which ")
    assert said.rstrip().endswith("got 4 (other settings need a file or folder of their own)")


def test_a_metric_of_ones_own(evaluate, videos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine_only.py").write_text(
        "def words(text, sample, own):\n    return len(text.split())\n"
        "def fails(text, sample, own):\n    return 1 / 0\n"
    )
    asked = ("--videos", str(videos), "--prompt", "?", "--clips", "1", "--methods", "strict")
    assert evaluate(*asked, "--metric", "mine_only:words") == 0
    assert "mine_only:words" in capsys.readouterr().out
    assert evaluate(*asked, "--metric", "mine_only:fails") == 1
    assert "mine_only:fails: failed on sample 0.mp4: ZeroDivisionError" in capsys.readouterr().err
    sys.modules.pop("mine_only")


def test_a_data_set(evaluate, videos, tmp_path, capsys):
    folder = tmp_path / "mme"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "abc.mp4").write_bytes((videos / "0.mp4").read_bytes())
    options = ["A. red", "B. blue", "C. green", "D. none"]
    row = {"videoID": "abc", "question_id": "1-1", "question": "What?", "options": options}
    (folder / "test.json").write_text(json.dumps([{**row, "answer": "B", "duration": "short"}]))
    code = evaluate("--dataset", "video-mme", str(folder), "--methods", "autoregression", "strict")
    said = capsys.readouterr()
    assert (
        code == 0 and "same choice as the target's own" in said.out and "right choice" in said.out
    )
    assert evaluate("--dataset", "coco", str(folder)) == 2
    assert f"--dataset: expected one of {', '.join(datasets.READERS)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "one of the arguments --manifest --videos --dataset is required"),
        (("--videos", "."), "--prompt: expected a text beside --videos, got none"),
        (("--manifest", "m", "--prompt", "x"), "--prompt: expected --videos beside it"),
        (("--manifest", "nowhere"), "--manifest: expected a file that can be read, got nowhere"),
        (("--manifest", "m", "--clips", "0"), "--clips: expected at least 1, got 0"),
        (("--manifest", "m", "--judge-url", "http://x"), "--judge-model: expected one beside"),
        (("--manifest", "m", "--judge-key-env", "K"), "--judge-url: expected one beside"),
        (
            (*("--manifest", "m", "--judge-url", "x", "--judge-model", "y"),),
            "--judge-url: expected http:// or https://, got 'x'",
        ),
        (
            tuple("--manifest m --judge-url http://x --judge-model y --judge-key-env NO".split()),
            "--judge-key-env: expected a variable that is set, got NO",
        ),
    ],
)
def test_what_contradicts_itself(evaluate, options, message, capsys):
    assert evaluate(*options) == 2
    assert f"lvspec: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "eagle"), "--methods: expected some of autoregression, "),
        (("--metric", "nothing"), "--metric: expected module:name, or one of choice, "),
        (("--profile", "nowhere.json"), "--profile: expected a file that lvspec calibrate wrote"),
        (("--confidence", "95"), "--confidence: expected a number above 0 and below 1, got 95"),
    ],
)
def test_wrong_values(evaluate, videos, options, message, capsys):
    assert evaluate("--videos", str(videos), "--prompt", "?", *options) == 2
    assert f"lvspec: error: {message}" in capsys.readouterr().err


RESTING = """
import time
from lvspec.cli import main
from lvspec.evaluation.journal import Journal
add = Journal.add
def rest(journal, record):
    add(journal, record)
    while len(journal.records) == 2:
        time.sleep(0.01)
Journal.add = rest
raise SystemExit(main())
"""
"""`lvspec` that goes no further than two captions, however late the signal comes."""


@pytest.mark.slow
def test_interrupted_in_a_terminal(random_pair_folders, videos, tmp_path):
    """Ctrl-C: 130, a table of what there is, and the same command goes on."""
    target, draft = map(str, random_pair_folders)
    out = tmp_path / "out"
    words = ["--target", target, "--draft", draft, "--device", "cpu", "--out", str(out)]
    words += ["--videos", str(videos), "--prompt", "?", "--max-new-tokens", "6"]
    methods = ["autoregression", "strict", "lvspec"]
    words += ["--methods", *methods]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    # A shell that starts tests in the background has them ignore the signal, and so would this.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    run = subprocess.Popen(
        [sys.executable, "-c", RESTING, "evaluate", *words],
        env=environment,
        preexec_fn=heard,
        **pipes,
    )
    records = out / "records.jsonl"
    try:
        while not (records.exists() and records.read_bytes().count(b"\n") == 3):
            assert run.poll() is None, run.communicate()
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        said, errors = run.communicate()
    finally:
        run.kill()
    assert run.returncode == 130, errors
    assert errors.strip().endswith("the same command goes on") and "3 samples" in said
    before = records.read_text().splitlines()
    command = [sys.executable, "-c", "from lvspec.cli import main; raise SystemExit(main())"]
    done = subprocess.run([*command, "evaluate", *words], env=environment, **pipes)
    assert done.returncode == 0, done.stderr
    after = records.read_text().splitlines()
    assert len(before) == 1 + 2 and len(after) == 1 + 3 * len(methods)
    seconds = {json.loads(line)["seconds"] for line in after[1:]}
    assert {json.loads(line)["seconds"] for line in before[1:]} <= seconds
