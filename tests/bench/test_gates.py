"""bench/pairs/gates.py and kept.py: what candidates see, and captions that are made once."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lvspec.config import DecodeConfig
from lvspec.evaluation.methods import Output
from lvspec.models.text_pass import StepOutput
from lvspec.policy import AcceptancePolicy
from lvspec.shapes import calibration
from lvspec.shapes.evaluation import make_clips, token_anchors
from lvspec.shapes.pair import load_embedded_pair

CONFIG = DecodeConfig(gamma=8, max_new_tokens=40)


@pytest.fixture(scope="module")
def gates(bench):
    return bench("pairs.gates")


@pytest.fixture(scope="module")
def pair():
    return load_embedded_pair()


@pytest.fixture(scope="module")
def clips(pair, tmp_path_factory):
    return make_clips(pair, "calibration", 2, tmp_path_factory.mktemp("clips"))


@pytest.mark.slow
def test_a_candidate_sees_what_the_draft_saw_and_changes_nothing(gates, pair, clips):
    found = []

    def score(rows):
        own, count = rows.output.peaks.clone(), int(rows.draft.shape.num_slots[0])
        again, draft = rows.step("target"), rows.step("draft")
        assert torch.equal(again.peaks, own)
        chosen = draft.logits[0, : count - 1].argmax(-1)
        assert torch.equal(chosen, rows.draft.tokens[0, 1:count])
        found.append(rows.is_first)
        return gates.without_sink(rows)

    strict = AcceptancePolicy.strict()
    plain = gates.GateDecoder(pair, strict, CONFIG, None)
    decoder = gates.GateDecoder(pair, strict, replace(CONFIG, trace=True), score)
    for clip in clips:
        assert torch.equal(decoder.generate(clip.inputs).tokens, plain.generate(clip.inputs).tokens)
    assert found[0] and found.count(True) == 2 and len(found) > 6


def test_heads_are_read_at_the_rows_of_the_tokens(gates, pair, clips):
    scores = {"heads": gates.every_head, "all": gates.layers(0, 1)}
    found, flags = gates.collect(pair, clips, CONFIG, scores, token_anchors)
    scores, same = calibration.collect_scores(pair, clips, CONFIG, "attention_peak")
    torch.testing.assert_close(found["heads"].mean(0), scores)
    assert torch.equal(found["all"], scores)
    assert torch.equal(flags, same) and flags.any() and not flags.all()


def test_the_sink_is_the_first_token(gates, pair, clips):
    """By hand, of an attention that gives half of what it has to the first token."""
    shape = (1, 1, 1, 3)
    cache = SimpleNamespace(visual=torch.tensor([[0, 1, 1]], dtype=torch.uint8))
    output = StepOutput(torch.zeros(1, 3, 4), torch.full(shape, 0.4), torch.full(shape, 0.3))

    def step(role):
        assert role == "target" and cache.visual.tolist() == [[1, 0, 0]]
        return StepOutput(output.logits, torch.full(shape, 0.5), torch.zeros(shape))

    rows = SimpleNamespace(output=output, engine=SimpleNamespace(cache=cache), step=step)
    torch.testing.assert_close(gates.without_sink(rows), torch.full((1, 3), 0.6))
    assert cache.visual.tolist() == [[0, 1, 1]]


def rows_of(peaks, *, is_first, slots):
    peaks = torch.tensor(peaks)[None, None, None]
    shape = SimpleNamespace(num_slots=torch.tensor([slots]))
    output = StepOutput(torch.zeros(1), peaks, peaks)
    return SimpleNamespace(output=output, is_first=is_first, draft=SimpleNamespace(shape=shape))


def test_what_is_running_begins_anew_with_a_sequence(gates):
    mean, rank = gates.Running(gates.over_mean), gates.Running(gates.rank)
    first = rows_of([1.0, 3.0, 90.0], is_first=True, slots=2)
    more = rows_of([2.0, 2.0, 6.0], is_first=False, slots=3)
    assert mean(first).tolist() == [[0.5, 1.5, 45.0]], "the third slot is padding"
    torch.testing.assert_close(mean(more), torch.tensor([[2.0, 2.0, 6.0]]) / 2.8)
    assert mean(first).tolist() == [[0.5, 1.5, 45.0]]
    assert rank(first).tolist() == [[0.0, 0.5, 1.0]]
    torch.testing.assert_close(rank(more), torch.tensor([[0.2, 0.2, 0.8]]))


def test_layers_by_depth(gates):
    rows = SimpleNamespace(output=StepOutput(None, None, torch.arange(8.0).view(8, 1, 1, 1)))
    parts = ((0, 1), (0.5, 0.75), (0.75, 1))
    assert [gates.layers(*part)(rows).item() for part in parts] == [3.5, 4.5, 6.5]
    rows.output.peaks = rows.output.peaks[:1]
    assert gates.layers(0.75, 1)(rows).item() == 0


def test_heads_are_chosen_by_labels_and_by_their_split(gates):
    torch.manual_seed(0)
    flags = torch.arange(200) < 60
    scale = torch.ones(12, 1)
    scale[[2, 7]] = 9.0  # these look where there are anchors
    bell = (0.3 * torch.randn(12, 200)).exp() / 100
    peaks = torch.where(flags, bell * scale, bell)
    by_label = gates.best_heads(peaks, lambda head: calibration.area_under_curve(head, flags))
    by_split = gates.best_heads(peaks, gates.split)
    assert set(by_label[:2].tolist()) == set(by_split[:2].tolist()) == {2, 7}
    assert len(by_label) == gates.NUM_HEADS
    assert gates.split(torch.full((30,), 0.25)) == 0
    output = StepOutput(None, None, torch.arange(6.0).view(3, 1, 2, 1))  # of 3 layers, 2 heads each
    rows = SimpleNamespace(output=output)
    assert gates.heads(torch.tensor([1, 4]))(rows).item() == 2.5


def test_captions_are_made_once(bench, tmp_path):
    kept, made = bench("pairs.kept"), []

    def method(clip):
        made.append(clip.path.name)
        stats = SimpleNamespace(num_strict=3)
        return Output("a ring", 0.5, [4] * 8, 2, 0.1, 0.25, SimpleNamespace(stats=stats))

    clip = SimpleNamespace(path=Path("x/evaluation-003.mp4"))
    path, settings = tmp_path / "lines", {"pair": "embedded", "gamma": 12}
    first = kept.KeptOutputs(path, settings).method("found", method)(clip)
    again = kept.KeptOutputs(path, settings).method("found", method)(clip)
    assert again == replace(first, generation=None) and made == ["evaluation-003.mp4"]
    assert (again.text, again.tokens, again.passes, again.regret, again.strict) == (
        *("a ring", 8, 2, 0.25),
        3,
    )
    for name, other in (("oracle", settings), ("found", {**settings, "gamma": 16})):
        kept.KeptOutputs(path, other).method(name, method)(clip)
    assert len(made) == 3 and len(path.read_text().splitlines()) == 3
    assert all(json.loads(line)["output"]["ids"] == [4] * 8 for line in path.open())
    nothing = kept.KeptOutputs(None, settings).method("found", method)
    assert nothing(clip).generation is not None and len(made) == 4
