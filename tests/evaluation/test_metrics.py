"""Metrics: known values, alike texts, multiple choice however it is answered, a user's own."""

import sys

import pytest

from lvspec.evaluation import metrics
from lvspec.evaluation.choices import choice_of, right_choice, without_labels
from lvspec.evaluation.metrics import METRICS, MetricError, find_metric, score
from lvspec.evaluation.samples import Sample

FREE = Sample("x", "x.mp4", "What?", references=("a red ring moves left", "the ring is red"))
CHOICE = Sample("y", "y.mp4", "Which?", choices=("A. red", "B. dark red", "C. blue"), answer="B")


def test_values_of_the_libraries():
    """ROUGE-L by hand: 4 of 5 words in order, both texts of 5 words."""
    assert metrics.rouge_l("a red ring moves right", FREE.references) == pytest.approx(0.8)
    assert metrics.rouge_l("рыжий кот спит", ["рыжий кот ест"]) == pytest.approx(2 / 3)
    assert 0.5 < metrics.chrf("a red ring moves right", FREE.references) < 1
    assert 0.5 < metrics.bleu("a red ring moves right", FREE.references) < 1
    assert metrics.chrf("", ["word"]) == metrics.rouge_l("", ["word"]) == 0


@pytest.mark.parametrize("name", ["chrf", "bleu", "rouge_l", "own_same", "own_chrf", "own_rouge_l"])
@pytest.mark.parametrize("text", ["the ring is red", ""])
def test_the_same_text_is_best(name, text):
    sample = Sample("x", "x.mp4", "?", references=("another", text))
    assert METRICS[name](text, sample, text) == 1
    assert METRICS[name]("zzz qqq", sample, text) < 0.2


def test_what_does_not_apply_is_left_out():
    free = score("a red ring", FREE, "a ring", METRICS)
    assert set(free) == {"chrf", "bleu", "rouge_l", "own_same", "own_chrf", "own_rouge_l"}
    assert set(score("B", CHOICE, None, METRICS)) == {"choice"}
    assert score("B", CHOICE, "A", ["choice", "own_choice"]) == {"choice": 1.0, "own_choice": 0.0}
    unclear = "I cannot say."
    assert score(unclear, CHOICE, unclear, ["choice", "own_choice"]) == {
        "choice": 0.0,
        "own_choice": 1.0,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        (" (b) ", "B"),
        ("b.", "B"),
        ("**B**", "B"),
        ("B. dark red", "B"),
        ("B) because it is not red", "B"),
        ("B\nIt is not red, nor blue.", "B"),
        ("The best answer is: B", "B"),
        ("Answer: (C)", "C"),
        ("I first thought the answer is A, but the correct answer is C.", "C"),
        ("The answer is a dark red ring", "B"),
        ("dark red", "B"),
        ("Dark  Red.", "B"),
        ("It is red, not green.", "A"),
        ("It is blue or red.", None),
        ("A ring can be seen", None),
        ("I think so", None),
        ("I would take B here", "B"),
        ("Z", None),
        ("", None),
    ],
)
def test_choice_of(text, expected):
    assert choice_of(text, CHOICE.choices) == expected
    assert choice_of(text, ["red", "dark red", "blue"]) == expected


def test_labels_are_told_from_words():
    assert without_labels(["A. red", "(B) blue"]) == ["red", "blue"]
    assert without_labels(["A. Lincoln", "G. Washington"]) == ["A. Lincoln", "G. Washington"]
    assert choice_of("C. Darwin", ["A. Lincoln", "C. Darwin"]) == "B"


def test_right_choice():
    assert right_choice(CHOICE) == "B"
    words = Sample("y", "y.mp4", "?", choices=("red", "blue"), answer="blue")
    assert right_choice(words) == "B"
    assert right_choice(Sample("y", "y.mp4", "Which: A or B?", answer="B")) == "B"
    assert right_choice(Sample("y", "y.mp4", "Why?", answer="Because")) is None


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Functions in a file of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_metric.py").write_text(
        "def words(text, sample, own):\n    return len(text.split()) / 4\n"
        "def nothing(text, sample, own):\n    return None\n"
        "def wrong(text, sample, own):\n    return text\n"
        "def fails(text, sample, own):\n    return sample.nowhere\n"
        "number = 3\n"
    )
    yield
    sys.modules.pop("my_metric", None)


def test_a_users_metric(module):
    names = ["my_metric:words", "my_metric:nothing"]
    assert score("two words", FREE, None, names) == {"my_metric:words": 0.5}
    with pytest.raises(MetricError, match="my_metric:wrong: expected a number for sample x, got"):
        score("two", FREE, None, ["my_metric:wrong"])
    with pytest.raises(MetricError, match="my_metric:fails: failed on sample x: AttributeError"):
        score("two", FREE, None, ["my_metric:fails"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chrff", "expected module:name, or one of choice, chrf, .*, got 'chrff'"),
        ("my_metric:", "expected module:name"),
        ("nowhere_at_all:f", "expected a module that can be imported, got nowhere_at_all:f: Mod"),
        ("my_metric:absent", "expected a function absent in my_metric, got None"),
        ("my_metric:number", "expected a function number in my_metric, got 3"),
    ],
)
def test_no_such_metric(module, name, message):
    with pytest.raises(ValueError, match=f"^metric: {message}"):
        find_metric(name)


@pytest.mark.parametrize(("package", "name"), [("sacrebleu", "chrf"), ("rouge_score", "rouge_l")])
def test_what_is_missing_is_named(package, name, monkeypatch):
    metrics._rouge.cache_clear()
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package.replace('_', '.')}.* 'lvspec\[evaluate\]'"):
        score("other", FREE, None, [name])
