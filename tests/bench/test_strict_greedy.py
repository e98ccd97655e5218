"""bench/strict_greedy.py: what it takes for the same, for a near tie and for another caption."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from lvspec.config import DecodeConfig
from lvspec.engine.decoder import Decoder
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.evaluation import make_clips
from lvspec.shapes.pair import load_embedded_pair


@pytest.fixture(scope="module")
def script(bench):
    return bench("strict_greedy")


@pytest.fixture(scope="module")
def pair():
    return load_embedded_pair()


def test_where_two_sequences_part(script):
    part = script.first_difference
    assert part([4, 5, 6], [4, 5, 6]) is None
    assert (part([4, 5, 6], [4, 7, 6]), part([4, 5], [4, 5, 6]), part([4], [])) == (1, 2, 0)


@pytest.mark.slow
def test_a_batch_ends_as_each_alone_and_a_wrong_token_is_judged(script, pair, tmp_path):
    drawn = make_clips(pair, "evaluation", 2, tmp_path)
    pixels = {"pixel_values_videos": drawn[1].inputs["pixel_values_videos"]}
    clips = [drawn[0], replace(drawn[1], inputs={**drawn[0].inputs, **pixels})]
    assert script.batches(clips, [0, 1]) == [[0, 1]] and script.batches(drawn, [1]) == [[1]]
    assert script.batches(drawn, [0, 1]) == [[0], [1]], "their prompts differ"
    together = script.greedy(pair.target, clips)
    assert together == [script.greedy(pair.target, [clip])[0] for clip in clips]
    end = pair.target.generation_config.eos_token_id
    assert together[0] != together[1] and all(t.index(end) == len(t) - 1 for t in together)

    config = DecodeConfig(gamma=8, max_new_tokens=script.MAX_NEW_TOKENS)
    strict = Decoder(pair.target, pair.draft, AcceptancePolicy.strict(), config)
    right = script.compare(pair.target, strict, clips[0], together[0])
    assert right == {"tokens": len(together[0]), "passes": right["passes"]}
    wrong = [*together[0]]
    wrong[6] = (wrong[6] + 1) % 180
    found = script.compare(pair.target, strict, clips[0], wrong)
    assert found["parted"] == 6 and found["regrets"][0] == 0 and found["regrets"][1] > 0.1
    cut = script.compare(pair.target, strict, clips[0], together[0][:-1])
    assert cut["parted"] == len(together[0]) - 1 and cut["regrets"] == [0, 0]


def test_near_ties_are_told_from_other_captions(script):
    same = {"clip": 0, "tokens": 10, "passes": 3}
    tie = {**same, "clip": 1, "parted": 4, "regrets": [0.0, script.NEAR / 2]}
    other = {**same, "clip": 2, "parted": 4, "regrets": [0.7, 0.0]}
    found = script.summary([same, tie, other])
    assert (found["equal"], found["near_ties"], found["different"]) == (1, 1, 1)
    assert found["parted"] == [tie, other] and found["tau"] == 27 / 9


def test_it_goes_on_behind_what_is_written_down(script, monkeypatch, tmp_path, capsys):
    lines, figures = tmp_path / "lines", tmp_path / "figures.json"
    done = {"clip": 0, "tokens": 11, "passes": 2}
    lines.write_text(json.dumps(done) + "\n")
    asked = []

    def greedy(target, clips):
        asked.extend(clips)
        return [[1, 2, 3]] * len(clips)

    monkeypatch.setattr(script, "greedy", greedy)
    monkeypatch.setattr(script, "compare", lambda *a: {"tokens": 3, "passes": 1})
    options = ["--pair", "embedded", "--clips", "3", "--lines", str(lines), "--json", str(figures)]
    monkeypatch.setattr(sys, "argv", ["strict_greedy.py", *options])
    assert script.main() == 0
    assert len(asked) == 2
    written = [json.loads(line)["clip"] for line in lines.read_text().splitlines()]
    assert written[0] == 0 and sorted(written) == [0, 1, 2]
    found = json.loads(figures.read_text())
    assert (found["clips"], found["equal"], found["tokens"]) == (3, 3, 17)
    assert torch.get_num_threads() == 1
