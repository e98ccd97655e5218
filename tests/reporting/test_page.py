"""The page of captions: all that it shows, nothing that it asks for, and nothing that is run."""

import json
import re
import sys

import captions
import pytest
from pages import Reader, assert_asks_for_nothing

import lvspec
from lvspec.reporting import page as pages
from lvspec.reporting import report as reporting
from lvspec.shapes.clips import write_clip
from lvspec.shapes.scenes import scenes


@pytest.fixture
def page(tmp_path):
    """`page(document)`: (its text, what is in it)."""

    def make(document, **options):
        source = tmp_path / "in.json"
        source.write_text(json.dumps(document))
        text = lvspec.report(source, tmp_path / "page.html", **options)
        assert (tmp_path / "page.html").read_text("utf-8") == text
        return text, Reader(text)

    return make


def test_every_token_is_there_and_its_kind(page):
    text, reader = page(captions.document())
    signs = {"\n": "↵", "": "<|im_end|>"}
    assert reader.words == [signs.get(piece, piece.strip()) for piece in captions.PIECES]
    buttons = [a for tag, a in reader.tags if tag == "button"]
    assert [re.search(r"k-(\w+)", a["class"])[1] for a in buttons] == captions.KINDS
    assert [i for i, a in enumerate(buttons) if "anchor" in a["class"].split()] == [4, 6]
    for button in buttons:
        assert ("article", button["aria-describedby"]) in [
            (tag, a.get("id")) for tag, a in reader.tags
        ]
    assert_asks_for_nothing(text, reader)
    for words in ("The target wanted tiny", "0.400 nats", "red", "drafted 4, verified 5 rows"):
        assert words in reader.text.replace("“", "").replace("”", "")
    assert "3.33" in reader.text and "threshold 0.06" in reader.text


def test_what_looks_like_markup_stays_text(page):
    evil = captions.EVIL
    other = captions.result(f"{evil}.mp4", error=f"broken {evil}")
    failed = {"video": f"c{evil}", "prompt": evil, "error": f"no file {evil}"}
    policy = {**captions.document()["policy"], "name": evil}
    document = captions.document(captions.result(), other, failed, policy=policy)
    text, reader = page(document, title=f"a {evil} title")
    scripts = [a.get("type") for tag, a in reader.tags if tag == "script"]
    assert scripts.count(None) == 1 and set(scripts) == {None, "application/json"}
    assert evil not in text
    for shown in (f"a {evil} title", f"no file {evil}", f"broken {evil}", f"a processor {evil}"):
        assert shown in reader.text
    assert_asks_for_nothing(text, reader)


def test_without_a_trace_the_page_says_what_is_missing(page):
    text, reader = page(captions.document(captions.result(traced=False)))
    assert reader.words[1] == "clip"
    assert "There is no trace" in reader.text and "Not shown: there is no trace" in reader.text
    assert "There are no keyframes: " in reader.text and "clip.mp4" in reader.text
    bare = captions.result(traced=False)
    for name in ("kinds", "relevance", "anchors", "stats", "pieces", "text"):
        bare[name] = None
    text, reader = page(captions.document(bare, policy=None))
    assert reader.words[1] == f"#{captions.TOKENS[1]}"
    assert "No relevance was computed" in reader.text


def test_interrupted_and_failed_results_are_said(page):
    stopped = captions.result("b.mp4", interrupted=True)
    failed = {"video": "c.mp4", "prompt": "what?", "error": "c.mp4: no such file"}
    _, reader = page(captions.document(captions.result(), stopped, failed, interrupted=True))
    assert "This run was broken off" in reader.text
    assert "Interrupted after 11 tokens" in reader.text
    assert "c.mp4: no such file" in reader.text
    _, reader = page(captions.document(failed))
    assert "no such file" in reader.text


def test_many_captions_are_in_a_table_and_the_first_in_full(page):
    results = [captions.result(f"{number}.mp4") for number in range(14)]
    _, reader = page(captions.document(*results))
    assert sum(a.get("class") == "caption" for _, a in reader.tags) == 12
    assert "13.mp4" in reader.text and "14 captions" in reader.text
    _, reader = page(captions.document(*results), captions=["13.mp4", 1])
    assert sum(a.get("class") == "caption" for _, a in reader.tags) == 2


def test_a_long_caption_with_its_keyframes_is_small(page, tmp_path):
    write_clip(scenes("evaluation", 1)[0], tmp_path / "clip.mp4")
    long = captions.result(str(tmp_path / "clip.mp4"))
    steps, shift = [], len(captions.TOKENS) - 1
    for name in ("tokens", "pieces", "kinds", "relevance", "anchors"):
        long[name] = long[name][:1] + 50 * long[name][1:]
    for number in range(50):
        steps += [{**s, "position": s["position"] + number * shift} for s in long["trace"]]
    mass = [[0.001 * (i + j) for j in range(40)] for i in range(len(long["tokens"]))]
    frames = {"timestamps": [0.1 * j for j in range(40)], "mass": mass}
    text, reader = page(captions.document({**long, "trace": steps, "frames": frames}))
    assert len(reader.words) == 501 and len(text.encode()) < 2**20
    pictures = [a for t, a in reader.tags if t == "img" and a["src"].startswith("data:image/jpeg")]
    assert len(pictures) == 10  # 40 groups of frames, four at a time


def test_a_name_that_is_not_utf_8_stops_nothing(page):
    text, _ = page(captions.document(captions.result("caf\udce9.mp4")))
    assert r"caf\udce9.mp4" in text


def test_a_generation_in_memory(tmp_path, random_pair, noisy_draft, make_prompt):
    inputs = make_prompt(3, ("video", 2, 4, 4), 5)
    config = lvspec.DecodeConfig(gamma=4, max_new_tokens=12, trace=True)
    policy = lvspec.AcceptancePolicy.lvspec()
    found = lvspec.generate(random_pair[0], noisy_draft, inputs, policy=policy, config=config)
    text = lvspec.report(found, prompt="what?", policy=policy)
    reader = Reader(text)
    assert reader.words == [f"#{token}" for token in found.tokens[0].tolist()]
    assert "There was no tokenizer" in reader.text and "no video is named" in reader.text
    with pytest.raises(ValueError, match="video, prompt, policy: expected None beside a file"):
        lvspec.report(tmp_path / "in.json", video="clip.mp4")


def test_missing_packages_are_named(page, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"png: expected matplotlib.*'lvspec\[report\]'"):
        page(captions.document(), png=tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    pages._environment.cache_clear()
    with pytest.raises(ImportError, match=r"report: expected Jinja2.*'lvspec\[report\]'"):
        page(captions.document())


def test_a_picture(page, tmp_path):
    from PIL import Image

    page(captions.document(), png=tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG" and picture.width == 1650
        colors = {color for _, color in picture.convert("RGB").getcolors(10**6)}
    # What is loose, shifted and an anchor has its colour in it.
    assert {(230, 159, 0), (0, 158, 115), (0, 114, 178)} <= colors


def test_a_page_that_cannot_be_written(page, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting.os, "replace", full)
    with pytest.raises(OSError, match="page: expected a file that can be written.*No space left"):
        page(captions.document())
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]
