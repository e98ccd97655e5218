"""lvspec caption: what it leaves when it is whole, killed, asked to stop, or given bad input."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from noise import write_noise

from lvspec.captioning.shards import lines_of, part_of
from lvspec.cli import main
from lvspec.cli.caption import _draining

QUICK = ["--max-new-tokens", "4", "--gamma", "2", "--num-frames", "2", "--device", "cpu"]
COMMAND = [sys.executable, "-P", "-m", "lvspec", "caption"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = write_noise(tmp_path_factory.mktemp("videos"), 3)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def options(random_pair_folders, tmp_path):
    """Of the random pair, and of the folder `out`."""
    target, draft = map(str, random_pair_folders)
    return ["--target", target, "--draft", draft, "--out", str(tmp_path / "out"), *QUICK]


@pytest.fixture
def manifest(videos):
    """`manifest(count)`: a manifest that asks for the same videos again and again."""

    def write(count):
        path = videos / "manifest.jsonl"
        lines = [{"id": f"clip {i}", "video": f"{i % 3}.mp4"} for i in range(count)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def rows(out):
    return [row for path in sorted(out.glob("*.jsonl")) for _, row in lines_of(path)]


def test_captions_of_a_folder(videos, options, tmp_path, capsys):
    given = ["caption", "--videos", str(videos), "--prompt", "describe the video.", *options]
    assert main(given) == 1  # one is broken
    line = capsys.readouterr().out
    assert line.startswith("3 captions | 1 failed | 0 were there | 0 left | ")
    found = {row["id"]: row for row in rows(tmp_path / "out")}
    assert sorted(found) == ["0.mp4", "1.mp4", "2.mp4", "broken.mp4"]
    assert "not a video" in found["broken.mp4"]["error"]
    assert found["0.mp4"]["caption"] is not None and len(found["0.mp4"]["tokens"]) == 4
    assert main(["caption", "--status", str(tmp_path / "out")]) == 0
    assert re.search(
        r"1/1 +3 +1 +0 .* closed .*\n3 done, 1 failed, 0 left", capsys.readouterr().out
    )
    assert main([*given, "--gamma", "3"]) == 2  # other settings
    assert "gamma: expected 2, with which" in capsys.readouterr().err
    assert main(given) == 0  # nothing is left to do
    assert capsys.readouterr().out.startswith("0 captions | 0 failed | 4 were there | 0 left | ")


def test_what_is_in_fewer_bytes_is_another_setting(videos, options, tmp_path, capsys):
    given = ["caption", "--videos", f"{videos}/0*", "--prompt", "describe.", *options]
    assert main(given) == 0
    others = {
        "--cache-dtype": "config.cache_dtype: expected 'auto', with which",
        "--target-weights": "target.weights_hash: expected ",
        "--draft-weights": "draft.weights_hash: expected ",
    }
    for option, message in others.items():
        assert main([*given, option, "fp8"]) == 2
        assert message in capsys.readouterr().err
    words = [word for option in others for word in (option, "fp8")]
    all_of_them = [*given, *words, "--out", str(tmp_path / "other")]
    assert main(all_of_them) == main(all_of_them) == 0
    assert "0 captions | 0 failed | 1 were there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--shard", "0/4"], "--shard: expected I/N with I from 1 to N, got 0/4"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--decode-workers", "0"], "--decode-workers: expected at least 1, got 0"),
        (["--clip-timeout", "0"], "--clip-timeout: expected seconds > 0, got 0"),
        (
            ["--ray", "--clip-timeout", "9"],
            "--clip-timeout: expected none beside --ray, whose tasks",
        ),
        (["--prompt", " "], "--prompt: expected a text, got ' '"),
        (["--videos", "nowhere-*"], "--videos: expected a pattern that finds videos, got nowhere-"),
    ],
)
def test_bad_options(wrong, message, capsys):
    given = ["caption", "--videos", ".", "--prompt", "what?", "--out", "out", *wrong]
    assert main(given) == 2
    assert message in capsys.readouterr().err


def test_status_of_another_folder(tmp_path, capsys):
    assert main(["caption", "--status", str(tmp_path)]) == 2
    assert "--status: expected a folder of lvspec caption" in capsys.readouterr().err


def started(*given):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*COMMAND, *given], stdout=pipe, stderr=pipe, text=True, env=environment
    )


def wait_for_rows(out, count, process):
    """Until there are as many rows in the journal."""
    journal = part_of(out / "captions-1-of-1.jsonl")
    end = time.monotonic() + 600
    while not journal.exists() or journal.read_bytes().count(b"\n") <= count:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_stopped_killed_and_continued_every_id_is_there_once(manifest, options, tmp_path):
    out, count = tmp_path / "out", 120
    path = part_of(out / "captions-1-of-1.jsonl")
    given = ["--manifest", manifest(count), "--prompt", "what?", *options, "--batch-size", "4"]
    process = started(*given)
    wait_for_rows(out, 4, process)
    children = _children(process.pid)
    assert children
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert re.search(r"^[1-9]\d* captions \| 0 failed \| 0 were there \| [1-9]\d* left", printed)
    drained = len(list(lines_of(path)))
    assert drained == int(printed.split()[0]) < count and not path.with_suffix("").exists()

    process = started(*given)
    wait_for_rows(out, drained + 9, process)
    children += _children(process.pid)
    process.kill()
    process.communicate()
    killed = len(list(lines_of(path)))
    end = time.monotonic() + 600
    while any(map(_lives, children)):
        assert time.monotonic() < end
        time.sleep(0.05)

    printed, errors = started(*given).communicate(timeout=600)
    assert f"{killed} were there | 0 left" in printed, errors
    found = rows(out)
    assert sorted(row["id"] for row in found) == sorted(f"clip {i}" for i in range(count))
    assert all(row["error"] is None for row in found) and not path.exists()
    tokens = {}  # of the same video and prompt
    for row in found:
        assert tokens.setdefault(row["video"], row["tokens"]) == row["tokens"]


@pytest.mark.slow
def test_killed_again_and_again_every_id_is_there_once(manifest, options, tmp_path):
    """Whatever was under way: before the first row, between rows, and within one."""
    out, count, kills = tmp_path / "out", 60, random.Random(0)
    path = part_of(out / "captions-1-of-1.jsonl")
    given = ["--manifest", manifest(count), "--prompt", "what?", *options, "--batch-size", "4"]
    there = 0
    for least in (0, kills.randint(1, 9), kills.randint(1, 9)):
        process = started(*given)
        wait_for_rows(out, there + least, process)
        process.kill()
        process.communicate()
        there = len(list(lines_of(path)))  # each is whole
        with open(path, "ab") as file:  # what a machine that stops leaves of a line
            file.write(b'{"id": "clip')
    printed, errors = started(*given).communicate(timeout=600)
    assert f"{there} were there | 0 left" in printed, errors
    found = rows(out)
    assert sorted(row["id"] for row in found) == sorted(f"clip {i}" for i in range(count))
    assert all(row["error"] is None for row in found) and not path.exists()


def test_a_second_signal_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with _draining() as is_asked:
        assert not is_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_asked() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def _children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def _lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
