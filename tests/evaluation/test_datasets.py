"""Data sets: tiny folders in the layouts of their authors, whole and with something wrong."""

import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from lvspec.evaluation.choices import right_choice
from lvspec.evaluation.datasets import READERS, VDC_ASPECTS, read_dataset


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def write_lines(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (value if isinstance(value, str) else json.dumps(value) for value in values)
    path.write_text("\n".join(texts) + "\n")


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def vdc_line(name):
    aspects = {f"{aspect}_caption": f"{aspect} of {name}" for aspect in (*VDC_ASPECTS, "short")}
    return {"video_id": name, "video_name": f"{name}.mp4", **aspects}


def test_vdc(tmp_path):
    touch(tmp_path / "videos" / "videos" / "ego_1.mp4")
    write_lines(tmp_path / "VDC_1k.jsonl", vdc_line("ego_1"), vdc_line("away"), "{broken")
    asked = [{"question": "Is it a pan?", "answer": "Yes"}]
    write_lines(tmp_path / "VDCScore_qa" / "camera.jsonl", {"away": []}, {"ego_1": asked})
    found = read_dataset("vdc", tmp_path)
    assert [sample.id for sample in found.samples] == [f"ego_1:{each}" for each in VDC_ASPECTS]
    assert [sample.category for sample in found.samples] == list(VDC_ASPECTS)
    by_aspect = {sample.category: sample for sample in found.samples}
    camera = by_aspect["camera"]
    assert camera.references == ("camera of ego_1",) and "camera" in camera.prompt
    assert camera.questions == (("Is it a pan?", "Yes"),)
    assert camera.video == str(tmp_path / "videos" / "videos" / "ego_1.mp4")
    assert by_aspect["background"].questions == ()
    assert len(found.problems) == 5
    assert str(found.problems[0]) == (
        f"{tmp_path / 'VDC_1k.jsonl'}, line 2: video: expected a file, got away.mp4: no such file"
    )
    assert found.problems[-1].where.endswith("line 3")


def test_video_detail_caption(tmp_path):
    touch(tmp_path / "Test_Videos" / "v_1.mkv")
    rows = [
        {"video_name": "v_1", "question": "What happens?", "answer": "A man runs."},
        {"video_name": "v_2", "question": "What happens?", "answer": "A dog runs."},
        {"video_name": "v_1", "question": "", "answer": "A dog runs."},
    ]
    write_table(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    found = read_dataset("video-detail-caption", tmp_path)
    (sample,) = found.samples
    assert (sample.id, sample.prompt, sample.expected) == ("v_1", "What happens?", ("A man runs.",))
    assert sample.video.endswith("v_1.mkv")
    assert [problem.message for problem in found.problems] == [
        "video: expected a file, got v_2: no such file",
        "question: expected a text, got ''",
    ]
    assert found.problems[0].where.endswith("parquet, row 2")


def moviechat_file(answers):
    asked = [{"question": "Man or woman?"}, {"question": "Where?"}]
    if answers:
        for each, answer in zip(asked, ("Man", "In a boat")):
            each["answer"] = answer
    moment = {"question": "What is the vehicle?", "time": 240}
    info = {"num_frame": 9624, "fps": 24, "video_path": "1.mp4", "class": "movie"}
    return {"info": info, "global": asked, "breakpoint": [moment]}


@pytest.mark.parametrize("answers", [True, False])
def test_moviechat(tmp_path, answers):
    touch(tmp_path / "videos" / "1.mp4")
    write_lines(tmp_path / "annotations" / "1.json", moviechat_file(False))
    write_lines(tmp_path / "annotations" / "2.json", {"info": {"video_path": "2.mp4"}})
    write_lines(tmp_path / "annotations" / "3.json", {"global": [{"question": "Who?"}]})
    if answers:
        write_lines(tmp_path / "gt" / "gt" / "1.json", moviechat_file(True))
    found = read_dataset("moviechat", tmp_path)
    assert [(sample.id, sample.prompt, sample.category) for sample in found.samples] == [
        ("1.mp4:1", "Man or woman?", "movie"),
        ("1.mp4:2", "Where?", "movie"),
    ]
    expected = [("Man",), ("In a boat",)] if answers else [(), ()]
    assert [sample.expected for sample in found.samples] == expected
    wrong = [str(problem).removeprefix(str(tmp_path)) for problem in found.problems]
    assert len(wrong) == 2
    assert wrong[0].startswith("/annotations/2.json, question 1: question: expected a text, got")
    assert wrong[1].startswith("/annotations/3.json, question 1: info: expected an object, got")


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_video_mme(tmp_path, form):
    touch(tmp_path / "data" / "fFjv93ACGo8.mp4")
    row = {
        "video_id": "001",
        "duration": "short",
        "videoID": "fFjv93ACGo8",
        "question_id": "001-1",
        "question": "When is the lantern lit?",
        "options": ["A. At dawn.", "B. At dusk.", "C. Never.", "D. Twice."],
        "answer": "B",
    }
    rows = [row, {**row, "question_id": "001-1"}]
    if form == "parquet":
        write_table(tmp_path / "videomme" / "test-00000-of-00001.parquet", rows)
    else:
        write_lines(tmp_path / "video_mme_test.json", rows)
    found = read_dataset("video-mme", tmp_path)
    (sample,) = found.samples
    assert sample.id == "001-1" and sample.category == "short" and right_choice(sample) == "B"
    assert sample.choices == tuple(row["options"])
    lines = sample.prompt.splitlines()
    assert lines[1:6] == [row["question"], *row["options"]]
    (problem,) = found.problems
    assert problem.where.endswith("row 2") and "got '001-1' again" in problem.message


def test_a_manifest_in_a_folder(tmp_path):
    touch(tmp_path / "a.mp4")
    write_lines(tmp_path / "manifest.jsonl", {"video": "a.mp4", "prompt": "What?"})
    assert [sample.id for sample in read_dataset("manifest", tmp_path).samples] == ["a.mp4"]


@pytest.mark.parametrize("name", READERS)
def test_another_folder_is_refused(name, tmp_path):
    with pytest.raises(OSError, match=r"^dataset: expected .* got none"):
        read_dataset(name, tmp_path)
    with pytest.raises(OSError, match=r"^dataset: expected a folder, got"):
        read_dataset(name, tmp_path / "nowhere")


def test_an_unknown_name(tmp_path):
    with pytest.raises(ValueError, match=r"^dataset: expected one of manifest, .* got 'coco'"):
        read_dataset("coco", tmp_path)


def test_pyarrow_is_named_where_it_is_missing(tmp_path, monkeypatch):
    write_table(tmp_path / "data" / "test-0.parquet", [{"video_name": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pyarrow .* 'lvspec\[evaluate\]'"):
        read_dataset("video-detail-caption", tmp_path)
