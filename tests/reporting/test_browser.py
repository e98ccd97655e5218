"""Pages in a real browser: what is seen, what is asked for, and what the keyboard reaches."""

import io
import json
import os
import re

import captions
import evaluations
import pytest
from browser import Browser, find_browser
from PIL import Image

import lvspec
from lvspec.cli import main
from lvspec.shapes.clips import write_clip
from lvspec.shapes.scenes import scenes

pytestmark = pytest.mark.slow

LOOKS = {
    "light": {},
    "dark": {"dark": True},
    "narrow": {"width": 400, "height": 800},
    "narrow, dark": {"width": 400, "height": 800, "dark": True},
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("no chromium or chrome is installed (apt-get install chromium)")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """What `lvspec generate` says of a clip, and its page, made by the commands of a user."""
    folder = tmp_path_factory.mktemp("traced")
    clip, written, page = (folder / name for name in ("clip.mp4", "out.json", "out.html"))
    write_clip(scenes("evaluation", 1)[0], clip)
    words = ["generate", "--video", clip, "--prompt", "describe the video.", "--gamma", 8]
    assert main([str(word) for word in (*words, "--trace", "--json", written)]) == 0
    assert main(["report", str(written), "--png", str(folder / "out.png")]) == 0
    return json.loads(written.read_text())["results"][0], page


@pytest.fixture(scope="module")
def handmade(tmp_path_factory):
    """A page with tokens of every kind, and markup in every text."""
    folder = tmp_path_factory.mktemp("handmade")
    source = folder / "in.json"
    source.write_text(json.dumps(captions.document()))
    lvspec.report(source, folder / "page.html", title=captions.EVIL)
    return folder / "page.html"


def brightness(picture):
    """Of the page's ground, 0 to 255."""
    with Image.open(io.BytesIO(picture)) as image:
        return sum(image.convert("L").getpixel((2, y)) for y in (5, 100, 300)) / 3


@pytest.mark.parametrize("look", LOOKS)
def test_a_page_of_the_commands(browser, traced, look):
    result, page = traced
    browser.open(page, **LOOKS[look])
    picture = browser.picture()
    if "LVSPEC_TEST_PICTURES" in os.environ:  # to be looked at by a person
        with open(os.path.join(os.environ["LVSPEC_TEST_PICTURES"], f"{look}.png"), "wb") as file:
            file.write(picture)
    assert browser.errors == []
    assert browser.requests == [page.as_uri()]
    assert (brightness(picture) < 60) == ("dark" in look)
    # Nothing is wider than the page.
    assert browser.value("document.documentElement.scrollWidth") == LOOKS[look].get("width", 1200)
    shown = browser.value("[...document.querySelectorAll('button.t .s')].map(x => x.innerText)")
    assert shown[:-1] == [piece.strip() for piece in result["pieces"][:-1]]
    assert browser.value(
        "[...document.querySelectorAll('button.t .s')].every(x => x.getClientRects().length > 0)"
    )
    pictures = "[...document.images].filter(x => !x.complete || !x.naturalWidth).length"
    assert browser.value(pictures) == 0
    assert browser.value("document.querySelectorAll('.frames img').length") == 4
    assert page.stat().st_size < 2**20


@pytest.mark.parametrize("look", LOOKS)
def test_a_page_of_an_evaluation(browser, tmp_path, look):
    records = evaluations.with_traces()
    page = tmp_path / "evaluation.html"
    lvspec.report(evaluations.write(tmp_path / "records.jsonl", records), page)
    browser.open(page, **LOOKS[look])
    assert (brightness(browser.picture()) < 60) == ("dark" in look)
    assert browser.errors == [] and browser.requests == [page.as_uri()]
    assert browser.value("document.documentElement.scrollWidth") == LOOKS[look].get("width", 1200)
    said = browser.value("document.body.innerText")
    for words in ("lvspec", "autoregression", "200.0 ms", captions.EVIL, "Worst captions first"):
        assert words in said
    # The worst is token by token below, and a link leads there.
    browser.value("document.querySelector('.worst a').click()")
    assert browser.value("location.hash") == "#caption-1"
    assert browser.value("document.querySelector('#caption-1 .text').innerText").strip()


def test_the_keyboard_reaches_every_token(browser, handmade):
    browser.open(handmade)
    for _ in range(20):
        browser.press("Tab")
        if browser.value("document.activeElement.matches('button.t')"):
            break
    texts = []
    for _ in captions.PIECES:
        texts.append(browser.value("document.activeElement.querySelector('.s').innerText"))
        said = browser.value("document.querySelector('.inspector').innerText")
        assert texts[-1] in said
        browser.press("ArrowRight")
    assert len(set(texts)) == len(captions.PIECES) and texts[8] == captions.EVIL
    browser.press("Home")
    for _ in range(3):
        browser.press("ArrowRight")
    said = browser.value("document.querySelector('.inspector').innerText")
    for words in ("small", "loose", "tiny", "0.400 nats", "5 best", "67 %"):
        assert words in said, said
    assert browser.value("document.querySelector('.frames .mt').innerText") == "10 %"
    assert browser.value("document.querySelector('.frame-subject').innerText") == "For “small”."
    # One stop: the next Tab leaves the caption.
    browser.press("Tab")
    assert not browser.value("document.activeElement.matches('button.t')")
    assert browser.errors == []


def test_the_mouse_shows_the_same(browser, handmade):
    browser.open(handmade)
    place = "document.querySelectorAll('button.t')[4].getBoundingClientRect()"
    x, y, width, height = (
        browser.value(f"{place}.{name}") for name in ("x", "y", "width", "height")
    )
    browser.point_at(x + width / 2, y + height / 2)
    said = browser.value("document.querySelector('.inspector').innerText")
    assert "blue" in said and "anchor" in said and "rejected" in said, said


def test_markup_in_texts_is_text(browser, handmade):
    browser.open(handmade)
    assert browser.value("document.title").startswith(captions.EVIL)
    assert captions.EVIL in browser.value("document.body.innerText")
    assert browser.errors == [] and browser.requests == [handmade.as_uri()]


def test_a_script_that_were_not_ours_would_not_run(browser, handmade, tmp_path):
    """What the page allows itself is its own script and data alone."""
    text = handmade.read_text()
    bad = "<script>window.ran = 1</script><img src='http://127.0.0.1:9/x.png'></main>"
    (tmp_path / "bad.html").write_text(text.replace("</main>", bad))
    browser.open(tmp_path / "bad.html")
    assert browser.value("window.ran") is None
    assert len(browser.errors) == 2
    assert all(re.search("Content Security Policy", str(error)) for error in browser.errors)


def test_without_script_everything_can_be_read(browser, handmade, tmp_path):
    text = re.sub(r"<script>.*?</script>", "", handmade.read_text(), flags=re.DOTALL)
    (tmp_path / "still.html").write_text(text)
    browser.open(tmp_path / "still.html")
    browser.value("document.querySelector('details.every').open = true")
    said = browser.value("document.querySelector('.details').innerText")
    assert "0.400 nats" in said and captions.EVIL in said
    assert browser.errors == []
