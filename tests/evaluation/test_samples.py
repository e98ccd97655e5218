"""Manifests: what is wrong with a line is said of that line, and the rest goes on."""

import json

import pytest

from lvspec.evaluation.samples import (
    Sample,
    read_manifest,
    samples_of_folder,
    samples_of_pattern,
)


@pytest.fixture
def manifest(tmp_path):
    """`manifest(line, ...)`: a file of these lines beside a.mp4 and b.mp4; objects become JSON."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()

    def write(*lines):
        path = tmp_path / "manifest.jsonl"
        texts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
        encoded = [text if isinstance(text, bytes) else text.encode() for text in texts]
        path.write_bytes(b"\n".join(encoded) + b"\n")
        return path

    return write


def test_all_keys(manifest, tmp_path):
    values = {
        "id": "one",
        "video": "a.mp4",
        "prompt": "Which?",
        "references": ["the red one"],
        "choices": ["A. red", "B. blue"],
        "answer": "A",
        "category": "colour",
        "questions": [{"question": "What colour?", "answer": "red"}],
        "whatever": 3,
    }
    found = read_manifest(manifest(values))
    expected = Sample(
        "one",
        str(tmp_path / "a.mp4"),
        "Which?",
        ("the red one",),
        ("A. red", "B. blue"),
        "A",
        "colour",
        (("What colour?", "red"),),
    )
    assert found.samples == (expected,) and found.problems == ()


GOOD = {"video": "a.mp4", "prompt": "What?"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "video": "c.mp4"}, "video: expected a file, got c.mp4: no such file"),
        ({**GOOD, "video": "."}, "video: expected a file, got .: a folder"),
        ({"prompt": "What?"}, "video: expected a text, got None"),
        ({**GOOD, "video": 3}, "video: expected a text, got 3"),
        ({**GOOD, "prompt": " \t"}, "prompt: expected a text, got an empty one"),
        ({"video": "a.mp4"}, "prompt: expected a text, got None"),
        ({**GOOD, "id": 7}, "id: expected a text, got 7"),
        ({**GOOD, "id": ""}, "id: expected a text, got an empty one"),
        ({**GOOD, "references": "red"}, "references: expected a list of texts, got 'red'"),
        ({**GOOD, "choices": ["red", 2]}, "choices: expected texts, got 2"),
        ({**GOOD, "answer": 1}, "answer: expected a text, got 1"),
        ({**GOOD, "questions": ["Why?"]}, "questions: expected objects with question and answer"),
        ('{"video": "a.mp4", "pro', 'expected a JSON object, got {"video": "a.mp4", "pro: '),
        ("[1]", "expected a JSON object, got [1]"),
        (b'{"video": "\xff"}', "expected a JSON object, got"),
    ],
)
def test_a_wrong_line_is_named_and_the_rest_goes_on(manifest, line, message):
    path = manifest({**GOOD, "prompt": "Before?"}, "", line, {**GOOD, "prompt": "Behind?"})
    found = read_manifest(path)
    assert [sample.prompt for sample in found.samples] == ["Before?", "Behind?"]
    (problem,) = found.problems
    assert str(problem).startswith(f"{path}, line 3: {message}")


def test_an_id_that_came_before(manifest):
    path = manifest({**GOOD, "id": "x"}, {**GOOD, "id": "y"}, {**GOOD, "id": "x", "prompt": "!"})
    found = read_manifest(path)
    assert [sample.id for sample in found.samples] == ["x", "y"]
    (problem,) = found.problems
    assert problem.where == f"{path}, line 3"
    assert problem.message == (
        f"id: expected one that no other sample has, got 'x' again (first in {path}, line 1)"
    )


def test_without_ids_videos_are_told_apart(manifest):
    lines = [GOOD, {**GOOD, "prompt": "Where?"}, {**GOOD, "video": "b.mp4"}, GOOD]
    found = read_manifest(manifest(*lines))
    assert [sample.id for sample in found.samples] == ["a.mp4", "a.mp4#2", "b.mp4"]
    (problem,) = found.problems
    assert problem.where.endswith("line 4") and "line 1)" in problem.message


def test_videos_are_relative_to_the_manifest(manifest, tmp_path, monkeypatch):
    manifest(GOOD, {**GOOD, "video": str(tmp_path / "b.mp4")})
    monkeypatch.chdir(tmp_path)
    found = read_manifest("manifest.jsonl")
    assert [sample.video for sample in found.samples] == ["a.mp4", str(tmp_path / "b.mp4")]


def test_a_missing_manifest(tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.jsonl"):
        read_manifest(tmp_path / "nowhere.jsonl")


def test_what_a_text_is_compared_with():
    sample = Sample("x", "x.mp4", "Who?", answer="the cat")
    assert sample.expected == ("the cat",)
    assert Sample("x", "x.mp4", "Who?", choices=("a cat", "a dog"), answer="A").expected == ()
    assert Sample("x", "x.mp4", "?", references=("a", "b"), answer="c").expected == ("a", "b")


def test_a_folder(tmp_path):
    for name in ("b.MP4", "a.mkv", "notes.txt", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "more.mp4").mkdir()
    found = samples_of_folder(tmp_path, "What?").samples
    assert [(s.id, s.video, s.prompt) for s in found] == [
        ("a.mkv", str(tmp_path / "a.mkv"), "What?"),
        ("b.MP4", str(tmp_path / "b.MP4"), "What?"),
    ]


def test_no_folder_of_videos(tmp_path):
    with pytest.raises(ValueError, match=r"^videos: expected a folder with videos"):
        samples_of_folder(tmp_path, "What?")
    with pytest.raises(OSError, match=r"^videos: expected a folder, got"):
        samples_of_folder(tmp_path / "nowhere", "What?")
    with pytest.raises(ValueError, match=r"^prompt: expected a text"):
        samples_of_folder(tmp_path, " ")


def test_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    for name in ("b.mp4", "a.mkv", "deep/b.mp4"):
        (tmp_path / name).touch()
    found = samples_of_pattern("**/b.*", "What?").samples
    assert [(s.id, s.video, s.prompt) for s in found] == [
        ("b.mp4", "b.mp4", "What?"),
        ("deep/b.mp4", "deep/b.mp4", "What?"),
    ]
    with pytest.raises(ValueError, match="^videos: expected a pattern that finds videos, got x*"):
        samples_of_pattern("x*", "What?")
    with pytest.raises(ValueError, match="^prompt: expected a text"):
        samples_of_pattern("**/b.*", " ")


def test_what_lines_may_leave_out(manifest):
    lines = [{"video": "a.mp4"}, {"id": "gone", "video": "gone.mp4", "prompt": "Who?"}]
    path = manifest(*lines)
    assert len(read_manifest(path).problems) == 2
    found = read_manifest(path, prompt="What?", check_files=False)
    assert [(s.id, s.prompt) for s in found.samples] == [("a.mp4", "What?"), ("gone", "Who?")]


def test_durations(manifest):
    found = read_manifest(manifest({**GOOD, "duration": 3}, {**GOOD, "id": "x", "duration": "3"}))
    assert found.samples[0].duration == 3.0
    assert "duration: expected seconds, got '3'" in str(found.problems[0])
