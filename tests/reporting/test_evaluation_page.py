"""The page of an evaluation: methods beside each other, and the worst captions first."""

import json

import captions
import pytest
from evaluations import ALL, record, with_traces, write
from pages import Reader, assert_asks_for_nothing

import lvspec
from lvspec.evaluation.evaluate import KIND
from lvspec.evaluation.journal import VERSION
from lvspec.reporting.evaluation_view import evaluation_view, word_changes
from lvspec.reporting.load import EVALUATION, EVALUATION_VERSION, load


@pytest.fixture
def source(tmp_path):
    """`source(records)`: a file that evaluate's own journal wrote."""

    def make(*arguments):
        return write(tmp_path / "records.jsonl", *arguments)

    return make


@pytest.fixture
def page(source, tmp_path):
    def make(*arguments, **options):
        text = lvspec.report(source(*arguments), tmp_path / "page.html", **options)
        return text, Reader(text)

    return make


def test_the_head_is_that_of_the_journal():
    assert (EVALUATION, EVALUATION_VERSION) == (KIND, VERSION)


def test_methods_stand_beside_each_other(page, tmp_path):
    text, reader = page(png=tmp_path / "picture.png")
    assert_asks_for_nothing(text, reader)
    assert "3 samples, 3 methods" in reader.text
    # 10 tokens in 1.1 and 0.4 seconds; 9 of them in 0.9 and 0.2.
    assert "lvspec 3 25.0 2.75× 4.50× 200.0 ms 4.50 3.50 70 %" in reader.text
    assert "chrF against the target’s own" in reader.text
    points = [a["class"] for tag, a in reader.tags if a.get("class", "").startswith("point ")]
    assert sorted(points) == ["point p-method", "point p-ours", "point p-reference"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_worst_captions_come_first_with_their_differences(source, page):
    view = evaluation_view(load(source()))
    assert [worst.record["id"] for worst in view.worst] == ["clip 2", "clip 1"]
    assert view.worst[1].parts == (
        ("a red ball", "same"),
        ("rolls", "gone"),
        ("moves", "new"),
        ("to the left.", "same"),
    )
    text, reader = page()
    assert captions.EVIL not in text
    assert f"target {captions.EVIL}" in reader.text
    assert reader.text.index("lvspec · clip 2") < reader.text.index("lvspec · clip 1")
    assert [tag for tag, _ in reader.tags if tag in ("del", "ins")].count("ins") >= 2


def test_the_worst_are_shown_token_by_token_where_there_is_a_trace(page):
    _, reader = page(with_traces())
    assert reader.words[1] == "clip" and len(reader.words) == 2 * len(captions.TOKENS)
    links = [a["href"] for tag, a in reader.tags if tag == "a"]
    assert {"#caption-1", "#caption-2"} <= set(links)


def test_what_is_unfinished_or_failed_is_said(page, source, tmp_path):
    failed = {name: record("strict", 2)[name] for name in ("id", "method", "video", "prompt")}
    text, reader = page([*ALL[:4], {**failed, "error": "clip2.mp4: no frame"}])
    assert "strict : 1 caption failed: clip2.mp4: no frame" in reader.text
    assert "5 of 9 captions are there" in reader.text
    path = source(ALL)
    path.write_text(path.read_text() + '{"id": "cl')
    reader = Reader(lvspec.report(path))
    assert "The last line was cut" in reader.text


def test_without_the_targets_own_nothing_is_compared(page, tmp_path):
    alone = [{**each, "scores": {}} for each in ALL if each["method"] == "lvspec"]
    _, reader = page(alone)
    assert "None of the methods" in reader.text and "No scores were written" in reader.text
    assert "Not shown: there is nothing to compare with." in reader.text
    with pytest.raises(ValueError, match="png: expected an evaluation with scores"):
        page(alone, png=tmp_path / "picture.png")


def test_the_same_texts_are_said_to_be_the_same(page):
    _, reader = page([each for each in ALL if each["method"] != "lvspec"])
    assert "Every caption of every method says what autoregression says." in reader.text


@pytest.mark.parametrize(
    "line, message",
    [
        ({"id": "a"}, "KeyError: 'method'"),
        ({**ALL[0], "tokens": None}, "TypeError"),
        ({"id": "a", "method": "b"}, "at least one caption, got none"),
    ],
)
def test_records_of_something_else_are_refused(source, line, message):
    with pytest.raises(ValueError, match="records.jsonl: expected") as caught:
        evaluation_view(load(source([line])))
    assert message in str(caught.value)


def test_captions_cannot_be_chosen(source):
    with pytest.raises(ValueError, match=r"captions: expected none of an evaluation, got \['1'\]"):
        lvspec.report(source(), captions=["1"])


def test_texts_without_a_word_in_common():
    assert word_changes("", "new words") == (("new words", "new"),)
    assert word_changes("old", "") == (("old", "gone"),)
    assert json.dumps(word_changes("a, b", "a, b")) == '[["a, b", "same"]]'
