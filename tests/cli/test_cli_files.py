"""Names that are not UTF-8, and results that cannot be written: no caption is lost."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lvspec.cli import captioning, main
from lvspec.environment import NotWritten, write_json
from lvspec.video import write_video

FULL = "/dev/full"
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason="needs /dev/full")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a.mp4, b.mp4 and one whose name is no UTF-8."""
    folder = tmp_path_factory.mktemp("files")
    for index, name in enumerate((b"a.mp4", b"b.mp4", b"\xff\xe9.mp4")):
        frames = torch.full((8, 84, 84, 3), 40 * index, dtype=torch.uint8)
        write_video(folder / "made.mp4", frames, fps=4)
        os.rename(folder / "made.mp4", os.path.join(os.fsencode(folder), name))
    return folder


@pytest.fixture
def words(random_pair_folders):
    """The words of a command that captions what is added to it."""
    target, draft = map(str, random_pair_folders)
    words = ["generate", "--prompt", "describe the video.", "--max-new-tokens", "8"]
    return [*words, "--target", target, "--draft", draft]


@pytest.fixture
def lvspec(words, files, capsys, monkeypatch, loaded_once):
    """`lvspec(*options)`: (exit code, stdout, stderr)."""
    monkeypatch.chdir(files)

    def run(*options):
        code = main([*words, *map(str, options)])
        return code, *capsys.readouterr()

    return run


def captions(out):
    return [line for line in out.splitlines() if " tokens | " in line]


def test_a_name_that_is_not_utf8(lvspec, tmp_path):
    name = os.fsdecode(b"\xff\xe9.mp4")
    code, out, err = lvspec("--video", "a.mp4", name, "b.mp4", "--json", tmp_path / "out.json")
    assert (code, err) == (0, "") and len(captions(out)) == 3
    content = (tmp_path / "out.json").read_bytes()
    results = json.loads(content.decode("utf-8", "strict"))["results"]
    assert [result["video"] for result in results] == ["a.mp4", name, "b.mp4"]
    assert all(result["tokens"] and result["error"] is None for result in results)
    assert "\\udcff\\udce9.mp4" in out


def test_a_name_that_is_not_utf8_and_not_there(lvspec, tmp_path):
    name = os.fsdecode(b"\xfe.mp4")
    code, out, _ = lvspec("--video", name, "a.mp4", "--json", tmp_path / "out.json")
    assert code == 1 and len(captions(out)) == 1
    results = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["results"]
    assert results[0]["video"] == name and name in results[0]["error"]


@pytest.mark.slow
def test_what_the_locale_cannot_spell_is_printed_as_it_can(words, files, tmp_path):
    """As in a pipe of an ASCII locale; the file name stands for any text."""
    os.link(files / "a.mp4", tmp_path / "é.mp4")
    command = [sys.executable, "-m", "lvspec", *words, "--video", "é.mp4"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("\\xe9.mp4\n") and len(captions(done.stdout)) == 1


@needs_full
def test_a_full_disk_loses_no_caption(lvspec):
    code, out, err = lvspec("--video", "a.mp4", "b.mp4", "--json", FULL)
    assert code == 1 and len(captions(out)) == 2
    errors = [line for line in err.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("lvspec: error: --json: expected a file ")
    assert f"got {FULL}: No space left" in errors[0]


def failing(monkeypatch, calls):
    """Writing fails in these calls, counted from 0; what each of the others wrote."""
    written, count = [], 0

    def write(path, value):
        nonlocal count
        count += 1
        if count - 1 in calls:
            raise NotWritten(f"--json: expected a file that can be written, got {path}: full")
        written.append(json.loads(json.dumps(value, default=str)))

    monkeypatch.setattr(captioning, "write_json", write)
    return written


def test_a_caption_is_shown_before_it_is_recorded(lvspec, monkeypatch, tmp_path, capsys):
    shown = []

    def write(*_):
        shown.append(capsys.readouterr().out)

    monkeypatch.setattr(captioning, "write_json", write)
    assert lvspec("--video", "a.mp4", "b.mp4", "--json", tmp_path / "out.json")[0] == 0
    assert [len(captions(text)) for text in shown] == [1, 1]


def test_a_disk_that_has_room_again_has_everything(lvspec, monkeypatch, tmp_path):
    written = failing(monkeypatch, {0, 1})
    place = tmp_path / "out.json"
    code, out, err = lvspec("--video", "a.mp4", "b.mp4", "a.mp4", "--json", place)
    assert code == 0 and len(captions(out)) == 3 and err.count("out.json: full") == 1
    (document,) = written
    assert [result["video"] for result in document["results"]] == ["a.mp4", "b.mp4", "a.mp4"]


def test_a_disk_that_is_full_in_the_end(lvspec, monkeypatch, tmp_path):
    failing(monkeypatch, {1})
    code, out, _ = lvspec("--video", "a.mp4", "b.mp4", "--json", tmp_path / "out.json")
    assert code == 1 and len(captions(out)) == 2


@needs_full
@pytest.mark.parametrize("stream", [[], pytest.param(["--stream"], marks=pytest.mark.slow)])
def test_what_cannot_be_printed_is_said(words, files, tmp_path, stream):
    place = tmp_path / "out.json"
    command = [sys.executable, "-m", "lvspec", *words, *stream]
    command += ["--video", "a.mp4", "--json", str(place)]
    with open(FULL, "w") as full:
        done = subprocess.run(
            command,
            cwd=files,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    assert "lvspec: error: stdout: expected room for the captions, got: No space" in done.stderr
    if not stream:
        (result,) = json.loads(place.read_text())["results"]
        assert len(result["tokens"]) == 8 and result["error"] is None


def test_a_file_of_results_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(NotWritten, match=r"^--json: .* got .*none/out.json: No such file"):
        write_json(tmp_path / "none" / "out.json", {})
    write_json(tmp_path / "out.json", {os.fsdecode(b"\xff"): os.fsdecode(b"\xe9")})
    assert json.loads((tmp_path / "out.json").read_text("utf-8")) == {"\udcff": "\udce9"}
