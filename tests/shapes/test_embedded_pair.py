"""The trained pair as it ships: weights, equality with HF greedy, and what looseness may cost."""

import json
from pathlib import Path

import pytest
import torch

from lvspec.cli import main
from lvspec.config import DecodeConfig
from lvspec.engine.api import generate
from lvspec.evaluation.methods import EvaluationInterrupted, huggingface_method, lvspec_method
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.captions import judge
from lvspec.shapes.evaluation import MAX_NEW_TOKENS, make_clips, oracle_gate, run_methods
from lvspec.shapes.pair import DRAFT, TARGET, load_embedded_pair

CONFIG = DecodeConfig(gamma=12, max_new_tokens=MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def pair():
    return load_embedded_pair()


@pytest.fixture(scope="module")
def clips(pair, tmp_path_factory):
    return make_clips(pair, "evaluation", 8, tmp_path_factory.mktemp("clips"), seed=11)


@pytest.fixture(scope="module")
def results(pair, clips):
    methods = {
        "autoregression": lvspec_method(pair, None, CONFIG),
        "hf": huggingface_method(pair, max_new_tokens=MAX_NEW_TOKENS, assisted=False),
        "assisted": huggingface_method(pair, max_new_tokens=MAX_NEW_TOKENS, assisted=True),
        "strict": lvspec_method(pair, AcceptancePolicy.strict(), CONFIG),
        "lvspec": lvspec_method(pair, AcceptancePolicy.lvspec(), CONFIG),
    }
    return run_methods(methods, clips)


def test_weights_are_small_and_in_safetensors():
    files = [file for folder in (TARGET, DRAFT) for file in Path(folder).iterdir()]
    assert sum(file.stat().st_size for file in files) < 30e6
    assert {file.name for file in files} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".py")]


def test_target_is_deep_and_draft_is_shallow(pair):
    assert 12 <= pair.target.config.text_config.num_hidden_layers <= 16
    assert 1 <= pair.draft.config.text_config.num_hidden_layers <= 2


@pytest.mark.slow
def test_lossless_methods_say_what_hf_greedy_says(results):
    texts = {name: [output.text for output in r.outputs] for name, r in results.items()}
    assert texts["autoregression"] == texts["hf"]
    assert texts["strict"] == texts["hf"]
    assert texts["assisted"] == texts["hf"]


@pytest.mark.slow
def test_captions_end_and_are_right(results, clips):
    for output, clip in zip(results["hf"].outputs, clips):
        assert output.tokens < MAX_NEW_TOKENS
        right, total, _ = judge(output.text, clip.scene)
        assert right / total >= 0.9
    row = results["hf"].summary(clips, results["hf"])
    assert row["attributes"] >= 0.97


@pytest.mark.slow
def test_loose_decoding_takes_fewer_passes_and_keeps_the_anchors(results, clips):
    strict = results["strict"].summary(clips, results["hf"])
    loose = results["lvspec"].summary(clips, results["hf"])
    assert loose["tau"] > 1.3 * strict["tau"]
    assert loose["regret"] > 0 == strict["regret"]
    assert loose["fidelity"]["attributes"] >= 0.97


@pytest.mark.slow
def test_summary_counts_passes_as_the_target_made_them(results, clips):
    for output in results["lvspec"].outputs:
        assert output.generation.stats.num_iterations == output.passes
    row = results["hf"].summary(clips, results["hf"])
    assert row["tau"] == 1 and row["speedup"] == 1
    assert row["fidelity"] == {"attributes": 1, "captions": 1}
    assert row["parts"] == {}, "HF's own code"
    assert results["lvspec"].summary(clips, results["hf"])["parts"].keys() == {"target", "draft"}


@pytest.mark.slow
def test_the_oracle_of_the_ablation(pair, clips):
    """The oracle marks the rows that want anchor words."""
    config = DecodeConfig(gamma=12, max_new_tokens=40, scorer=oracle_gate(pair), trace=True)
    result = generate(
        pair.target, pair.draft, clips[0].inputs, policy=AcceptancePolicy.strict(), config=config
    )
    words = [pair.processor.tokenizer.decode(token).strip() for token in result.tokens[0, 1:]]
    marked = [word for word, score in zip(words, result.relevance[0, 1:]) if score]
    others = [word for word, score in zip(words, result.relevance[0, 1:]) if not score]
    assert {"one", "two"} & set(marked) and "the" not in marked
    assert not {"one", "two", *clips[0].scene.shapes[0].description.split()} & set(others)


@pytest.mark.slow
def test_an_interrupted_evaluation_keeps_the_complete_clips(pair, clips):
    calls = 0
    autoregression = lvspec_method(pair, None, DecodeConfig(max_new_tokens=4))

    def interrupting(clip):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return autoregression(clip)

    with pytest.raises(EvaluationInterrupted) as stopped:
        run_methods({"plain": autoregression, "interrupting": interrupting}, clips)
    assert [len(result.outputs) for result in stopped.value.results.values()] == [2, 2]


@pytest.mark.slow
def test_demo_prints_a_row_for_every_method_and_the_same_in_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out, rows_file = tmp_path / "out", tmp_path / "rows.json"
    arguments = ["demo", "--clips", "2", "--gamma", "8", "--out", str(out)]
    assert main([*arguments, "--json", str(rows_file)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(rows_file.read_text())
    methods = ["autoregression", "hf generate", "hf assisted", "strict", "fly", "lvspec"]
    assert [row["method"] for row in document["rows"]] == methods
    assert all(method in printed for method in methods)
    keys = {
        "method",
        "tokens_per_s",
        "speedup",
        "decode_speedup",
        "tau",
        "attributes",
        "captions",
        "fidelity",
    }
    keys |= {"regret", "warm_up_s", "parts", "gamma"}
    assert all(row.keys() == keys for row in document["rows"])
    assert (document["clips"], document["gamma"], document["strict_equals_hf"]) == (2, 8, 2)
    assert [row["gamma"] for row in document["rows"]] == [[], [], [], [8], [8], [8]]
    assert "strict says what hf generate says on 2 of 2 clips" in printed
    assert document["environment"]["torch"] == torch.__version__
    assert len(list(out.glob("*.mp4"))) == 2
    assert str(out) in printed.replace("\n", "")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--clips", "0"], "--clips: expected at least 1, got 0"),
        (["--gamma", "64"], "gamma: expected an integer from 1 to 63, got 64"),
    ],
)
def test_demo_refuses_bad_numbers(option, message, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), *option]) == 2
    assert message in capsys.readouterr().err
