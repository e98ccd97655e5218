"""Methods: HF's cache, turns that fail, and speeds of captions."""

from types import SimpleNamespace

import pytest
import torch

from lvspec.evaluation.methods import huggingface_method, in_turns
from lvspec.evaluation.records import Timing, acceptance_of, merged, record_of
from lvspec.evaluation.samples import Sample
from lvspec.evaluation.speeds import speeds

PROMPT = SimpleNamespace(inputs={"input_ids": torch.tensor([[8, 9]])}, draft_inputs=None)


def test_a_static_cache_where_transformers_allows_it(loaded_pair, monkeypatch):
    """Before 5.24 it refuses one with an assistant: asked once, and said in the output."""
    asked = []

    def generate(input_ids, cache_implementation=None, **options):
        asked.append(cache_implementation)
        if cache_implementation is not None:
            raise ValueError("assisted generate is not supported with Static cache classes`")
        assert "stopping_criteria" not in options and "max_cache_len" not in options
        return torch.cat([input_ids, torch.tensor([[10, 11]])], dim=1)

    monkeypatch.setattr(loaded_pair.target, "generate", generate)
    given = {"max_new_tokens": 4, "assisted": True}
    method = huggingface_method(loaded_pair, **given, cache="static")
    outputs = [method(PROMPT), method(PROMPT)]
    assert asked == ["static", None, None]
    assert [(output.cache, output.ids) for output in outputs] == [("dynamic", [10, 11])] * 2
    monkeypatch.setattr(loaded_pair.target, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        huggingface_method(loaded_pair, **given)(PROMPT)
    assert not loaded_pair.target.model.language_model._forward_hooks, "no hook is left behind"


def test_a_failure_ends_one_caption():
    """A method whose warm-up failed warms up at the next prompt; others' errors end the run."""
    said = []

    def method(name, wrong):
        def caption(prompt):
            said.append((name, prompt))
            if prompt == wrong:
                raise ValueError(prompt)
            return prompt

        return caption

    methods = {"a": method("a", 0), "b": method("b", 1)}
    turns = list(in_turns(methods, [0, 1], errors=(ValueError,)))
    found = [(turn.index, turn.method, type(turn.output), turn.warm_up is None) for turn in turns]
    assert found == [
        (0, "a", ValueError, True),
        (0, "b", int, False),
        (1, "b", ValueError, True),
        (1, "a", int, False),
    ]
    assert said == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 1)]
    with pytest.raises(ValueError):
        list(in_turns(methods, [0, 1]))


def test_speeds_by_hand():
    """Medians of ratios, and tau over all passes; the first token costs none."""
    mine = [Timing(11, 2, 1.0, 0.5), Timing(21, 4, 2.0, 1.0), Timing(31, 5, 1.0, None)]
    other = [Timing(11, 10, 2.0, 1.0), Timing(21, 20, 2.0, 2.0), Timing(31, 30, 4.0, 3.0)]
    found = speeds(mine, other)
    assert found["tokens_per_s"] == 11 and found["speedup"] == 2
    assert found["decode_speedup"] == 2 and found["tau"] == 60 / 11
    alone = [Timing(1, 0, 1.0, None)]
    assert speeds(alone, alone)["tau"] is None and speeds(alone, alone)["decode_speedup"] is None


def test_acceptance_by_hand():
    """Three steps that drafted four tokens each, and accepted 4, 1 and 0 of them."""
    stats = {
        "iterations": 3,
        "drafted": 12,
        "counts": {"rejected": 7},
        "acceptance_by_position": [2 / 3, 1 / 3, 1 / 3, 1 / 3],
    }
    assert acceptance_of(stats, 9) == {
        "steps": 3,
        "drafted": 12,
        "accepted": 5,
        "mean_acceptance_length": pytest.approx(8 / 3),
        "acceptance_rate": 5 / 12,
        "accepted_by_position": [2, 1, 1, 1],
    }
    assert acceptance_of({"iterations": 4}, 11)["mean_acceptance_length"] == 2.5


def test_lines_of_a_journal_complete_each_other():
    sample = Sample("a", "a.mp4", "?")
    failed = record_of(sample, "strict", RuntimeError("no\nroom"), None)
    assert failed["error"] == "RuntimeError: no room"
    assert record_of(sample, "strict", ValueError("x: expected y"), 2.0)["error"] == "x: expected y"
    again = {**failed, "error": None, "text": "a ring"}
    judged = {"id": "a", "method": "strict", "judge": "m", "scores": {"judge": 1.0}}
    stray = {"id": "b", "method": "strict", "judge": "m", "scores": {"judge": 1.0}}
    found = merged([failed, again, {**judged, "scores": {"chrf": 0.5}}, judged, stray])
    assert found == {
        ("a", "strict"): {**again, "judge": "m", "scores": {"chrf": 0.5, "judge": 1.0}}
    }
