"""The page of an evaluation: methods beside each other, and the worst captions first."""

import json

import captions
import pytest
from pages import Reader, assert_asks_for_nothing

import lvspec
from lvspec.evaluation.evaluate import KIND
from lvspec.evaluation.journal import VERSION, Journal
from lvspec.reporting.evaluation_view import evaluation_view, word_changes
from lvspec.reporting.load import EVALUATION, EVALUATION_VERSION, load

OWN = "a red ball rolls to the left."
TEXTS = {
    "autoregression": [OWN, OWN, OWN],
    "strict": [OWN, OWN, OWN],
    "lvspec": [OWN, "a red ball moves to the left.", f"a {captions.EVIL} rolls."],
}
SCORES = {"autoregression": [1, 1, 1], "strict": [1, 1, 1], "lvspec": [1, 0.9, 0.2]}


def record(method, index, **changes):
    """One line, as `lvspec evaluate` writes it."""
    text, score = TEXTS[method][index], SCORES[method][index]
    steps = {"autoregression": 9, "strict": 4, "lvspec": 2}[method]
    return {
        "id": f"clip {index}",
        "method": method,
        "video": f"clip{index}.mp4",
        "prompt": "what?",
        "error": None,
        "seconds": 0.2 + steps / 10,
        "prefill_s": 0.2,
        "decode_s": steps / 10,
        "text": text,
        "tokens": list(range(10)),
        "stats": {"iterations": steps, "regret": 1 - score, "gamma": 4},
        "acceptance": {
            "steps": steps,
            "drafted": 4 * steps,
            "accepted": 9 - steps,
            "mean_acceptance_length": 9 / steps,
            "acceptance_rate": 0.5,
            "accepted_by_position": [] if method == "autoregression" else [steps, 1, 0, 0],
        },
        "scores": {"own_same": float(text == OWN), "own_chrf": score},
        **changes,
    }


def traced(index):
    """A line of lvspec's with a trace."""
    return {**captions.result(), **record("lvspec", index, tokens=captions.TOKENS)}


SETTINGS = {
    "target": {"name": f"target {captions.EVIL}", "config_hash": "1"},
    "methods": {name: {"policy": None} for name in TEXTS},
}
ALL = [record(method, index) for index in range(3) for method in TEXTS]


@pytest.fixture
def source(tmp_path):
    """`source(records)`: a file that evaluate's own journal wrote."""

    def write(records=ALL, settings=SETTINGS):
        path = tmp_path / "records.jsonl"
        path.unlink(missing_ok=True)
        with Journal(path, EVALUATION, settings) as journal:
            for each in records:
                journal.add(each)
        return path

    return write


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
    records = [each if each["method"] != "lvspec" else traced(int(each["id"][-1])) for each in ALL]
    _, reader = page(records)
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
