"""lvspec report: where pages go, and what is refused by name."""

import json
import sys

import captions
import pytest

from lvspec.cli import main


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "out.json"
    path.write_text(json.dumps(captions.document()))
    return path


@pytest.fixture
def report(capsys):
    """`report(words, ...)`: (exit code, stdout, stderr)."""

    def run(*words):
        code = main(["report", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_the_page_stands_beside_its_source(report, source, tmp_path):
    code, out, err = report(source)
    assert (code, out, err) == (0, f"{tmp_path / 'out.html'}\n", "")
    assert captions.PIECES[1].strip() in (tmp_path / "out.html").read_text()


def test_pages_and_pictures_go_where_they_should(report, source, tmp_path):
    page, png = tmp_path / "a page.html", tmp_path / "a.png"
    options = ["--captions", "clip.mp4", "--title", "mine"]
    code, out, _ = report(source, "--out", page, "--png", png, *options)
    assert code == 0 and out.splitlines() == [str(page), str(png)]
    assert "<title>mine" in page.read_text() and png.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    "words, messages",
    [
        (["none.json"], ["FILE: expected a file, got none.json: no such file"]),
        (["."], ["got the folder .\n"]),
        (["folder"], ["got the folder folder (perhaps folder/records.jsonl)"]),
        (["text.json"], ["text.json: expected the JSON of", "got neither ('no')"]),
        (["out.json", "--out", "none/x.html"], ["--out: expected a name in an existing folder"]),
        (["out.json", "--out", "."], ["--out: expected the name of a file, got the folder ."]),
        (["out.json", "--out", "out.json"], ["--out: expected another file than out.json"]),
        (["out.json", "--png", "out.json"], ["--png: expected another file than out.json"]),
        (["out.json", "--png", "out.html"], ["--png: expected another file than --out"]),
        (["out.json", "--captions", 2], ["--captions: expected numbers from 1 to 1", "'2'"]),
        (["out.json", "--caption"], ["expected at least one argument"]),
        (["out.json", "--colour"], ["--colour: expected an option"]),
        ([], ["FILE"]),
    ],
)
def test_bad_input_is_named(words, messages, report, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text("no")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "records.jsonl").touch()
    code, out, err = report(*words)
    assert code == 2 and out == ""
    assert err.startswith("lvspec: error: ") and err.count("\n") == 1, err
    for message in messages:
        assert message in err
    assert not (tmp_path / "out.html").exists()


def test_without_its_packages_it_says_what_to_install(report, source, monkeypatch):
    from lvspec.reporting import page

    page._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, out, err = report(source)
    assert code == 1 and out == "" and "pip install 'lvspec[report]'" in err
