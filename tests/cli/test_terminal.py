"""Captions and figures on a terminal, and result files that are whole or not there."""

import io
import json
import os

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lvspec import environment as facts
from lvspec.cli.terminal import (
    PrintStreamer,
    TokenText,
    caption_text,
    legend,
    results_table,
    statistics_line,
)
from lvspec.engine.result import Generation
from lvspec.engine.stats import DecodeStats, Moment
from lvspec.shapes.tokenizer import build_tokenizer

SENTENCE = " the clip shows two plain shapes on a blue background."
KINDS = [3, 0, 1, 1, 2, 0, 0, 3, 0, 0, 0, 3]  # of eleven words and marks, and the end


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def generation(tokenizer):
    ids = [*tokenizer.encode(SENTENCE), tokenizer.eos_token_id]
    tokens, kinds = torch.tensor([ids]), torch.tensor([KINDS], dtype=torch.uint8)
    stats = DecodeStats(torch.device("cpu"), gamma=4)
    for accepted in (4, 2, 2):
        stats.add(accepted, 5, 1.25)
    stats.close(kinds[0])
    stats.timer.add("verify", Moment(0.0, 0.0), Moment(0.5, 0.0))
    return Generation(tokens, tokens, kinds, torch.zeros(1, 12), stats, None, tokenizer)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token for each byte, as byte-level tokenizers spell rare characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE({character: index for index, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_a_caption_has_its_colours_and_its_text(generation):
    text = caption_text(generation)
    assert text.plain == generation.text == "the clip shows two plain shapes on a blue background."
    coloured = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert coloured == {
        "the": "cyan",
        "shows": "yellow",
        "two": "yellow",
        "plain": "magenta",
        "a": "cyan",
    }


def test_anchors_are_marked_whatever_their_kind(generation):
    anchors = [index in (3, 8) for index in range(12)]
    text = caption_text(generation, anchors)
    coloured = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert coloured["two"] == "yellow bold underline" and coloured["blue"] == "bold underline"
    with pytest.raises(ValueError, match="anchors: expected one for each of 12 tokens, got 1"):
        caption_text(generation, [True])


def test_no_colour_where_there_is_no_terminal(generation):
    page = io.StringIO()
    console = Console(file=page, width=200)
    console.print(caption_text(generation), legend(), results_table([("a.mp4", generation)]))
    assert "\x1b" not in page.getvalue() and "blue background." in page.getvalue()


def test_legend_names_what_caption_text_uses():
    words = legend().plain.split()
    assert [w for w in words if w in ("exact", "loose", "shift", "bonus", "anchor")] == [
        "exact",
        "loose",
        "shift",
        "bonus",
        "anchor",
    ]
    assert "anchor" not in legend(anchors=False).plain


def test_statistics(generation):
    assert statistics_line(generation) == (
        "12 tokens | 24.0 tokens/s | tau 3.67 | 6 exact, 2 loose, 1 shift, 3 bonus, 4 rejected | "
        "regret 1.25 nats"
    )


def test_names_in_the_table_stay_whole(generation):
    """One line a row, whatever the width: figures line up, a name is the last word of its line."""
    names = ["a.mp4", "a/long/name/" * 9 + "b.mp4", "with spaces, and more.mp4"]
    lines = results_table([(name, generation) for name in names]).plain.splitlines()
    assert len(lines) == 4 and lines[0].endswith("  regret  video")
    place = lines[0].index("video")
    assert [line[place:] for line in lines[1:]] == names
    assert lines[1][:place].split() == ["12", "24.0", "3.67", "6", "2", "1", "3", "1.25"]
    assert all(line.rstrip() == line and len(line[:place]) < 75 for line in lines)


def test_warm_up_and_what_is_applied_stand_apart(generation):
    stats = generation.stats
    stats.timer.add("draft", Moment(0.5, 0.0), Moment(3.5, 2.5))  # 2.5 of the 3 s are warm-up
    stats.timer.add("capture", Moment(4.0, 2.5), Moment(5.0, 2.5))
    stats.generation_config = {"repetition_penalty": 1.05}
    line = statistics_line(generation)
    assert line.startswith("12 tokens | 12.0 tokens/s without 3.5 s of warm-up | tau 3.67 | ")
    assert line.endswith(" | regret 1.25 nats | repetition_penalty 1.05")
    stats.num_warm_up_tokens = 6
    assert "| 6.0 tokens/s without" in statistics_line(generation)


@pytest.mark.parametrize("sentence", ["naïve café 🙂 — 漢字", "plain", " é"])
def test_characters_of_several_tokens_come_whole(byte_tokenizer, sentence):
    pieces = TokenText(byte_tokenizer)
    ids = byte_tokenizer.encode(sentence)
    found = [pieces.push(token) for token in ids]
    assert "".join(found) == sentence and pieces.flush() == ""
    assert len(ids) == len(sentence.encode()) and not any("\ufffd" in piece for piece in found)


def test_half_a_character_at_the_end_is_shown_as_such(byte_tokenizer):
    pieces = TokenText(byte_tokenizer)
    ids = byte_tokenizer.encode("a🙂")[:-1]
    assert "".join(pieces.push(token) for token in ids) == "a"
    assert pieces.flush() == "\ufffd"


def test_a_streamer_prints_the_caption_and_not_the_prompt(generation, tokenizer):
    page = io.StringIO()
    streamer = PrintStreamer(tokenizer, page)
    streamer.put(torch.tensor(tokenizer.encode(" a red circle")))
    for token in generation.tokens[0]:
        streamer.put(token[None])
    assert page.getvalue() == generation.text
    streamer.end()
    assert page.getvalue() == generation.text + "\n"


def test_json_is_whole_or_not_there(tmp_path):
    place = tmp_path / "out.json"
    facts.write_json(place, {"tau": float("nan"), "path": tmp_path, "ids": (1, 2), "é": None})
    assert json.loads(place.read_text(encoding="utf-8")) == {
        "tau": None,
        "path": str(tmp_path),
        "ids": [1, 2],
        "é": None,
    }
    with pytest.raises(TypeError):
        facts.write_json(place, {"tensor": torch.zeros(1)})
    assert json.loads(place.read_text(encoding="utf-8"))["ids"] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_json_through_a_link_and_into_a_pipe(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    facts.write_json(tmp_path / "link.json", [1])
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == [1]
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    facts.write_json(tmp_path / "pipe", [2])
    assert json.loads(os.read(end, 100)) == [2]
    os.close(end)


def test_environment_is_plain_and_complete():
    found = facts.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu" and found["lvspec"] and found["transformers"]
    assert found["commit"] is None or len(found["commit"]) == 40
