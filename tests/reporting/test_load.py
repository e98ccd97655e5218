"""What a page is made of, and how anything else is refused."""

import json

import captions
import pytest

from lvspec.reporting.load import EVALUATION, Captions, Evaluation, choose, load

HEAD = {"lvspec": EVALUATION, "version": 1, "settings": {"gamma": 8}}
RECORD = {"id": "a", "method": "strict", "text": "a"}


def lines(*values):
    return "".join(f"{json.dumps(value)}\n" for value in values)


@pytest.fixture
def file(tmp_path):
    """`file(content)`: its path; what is no text is written as JSON."""

    def write(content, name="in.json"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_captions_are_known(file):
    found = load(file(captions.document(interrupted=True)))
    assert isinstance(found, Captions) and found.interrupted
    assert [result["video"] for result in found.results] == ["clip.mp4"]
    assert found.facts["draft"] == "draft" and "results" not in found.facts


def test_files_of_before_the_head_are_captions(file):
    old = captions.document()
    del old["lvspec"], old["version"]
    assert isinstance(load(file(old)), Captions)


def test_an_evaluation_is_known(file):
    found = load(file(lines(HEAD, RECORD)))
    assert isinstance(found, Evaluation) and not found.torn
    assert found.records == (RECORD,) and found.settings == {"gamma": 8}


def test_a_torn_line_is_left_out_and_known(file):
    found = load(file(lines(HEAD, RECORD) + '{"id": "b", "te'))
    assert found.records == (RECORD,) and found.torn


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "got neither (''): "),
        ("a caption", "got neither ('a caption')"),
        (b"\xff\xfe", "bytes that are not UTF-8"),
        ([1], "got a list"),
        ({"rows": []}, "without a list of results"),
        ({"lvspec": "profile", "version": 1}, "that is a profile"),
        (captions.document(version=2), "expected version 1, got 2"),
        ({**captions.document(), "results": []}, "at least one result, got none"),
        (
            {**captions.document(interrupted=True), "results": []},
            "it was interrupted before the first",
        ),
        ({**captions.document(), "results": [3]}, "object as result 1, got a number"),
        (lines({**HEAD, "lvspec": "calibration"}, RECORD), "that is a calibration"),
        (lines({**HEAD, "version": 9}, RECORD), "expected version 1, got 9"),
        (lines(HEAD), "at least one record, got none"),
        (json.dumps(HEAD), "at least one record, got none"),
        (lines(HEAD) + "nonsense\n" + lines(RECORD), "line 2: expected a record, got 'nonsense'"),
    ],
)
def test_what_is_something_else_is_named(file, content, message):
    path = file(content)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert message.removesuffix(": ") in str(caught.value) and str(path) in str(caught.value)


def test_results_are_chosen_by_number_and_name():
    many = Captions(tuple(captions.result(f"clips/{name}.mp4") for name in "abc"), {}, "out.json")
    assert [r["video"] for r in choose(many, ["3", "a.mp4", "clips/c.mp4"]).results] == [
        "clips/c.mp4",
        "clips/a.mp4",
    ]
    with pytest.raises(ValueError, match="numbers from 1 to 3 or videos of out.json, got '4'"):
        choose(many, ["4"])
