"""The scripts of bench/ that share a set-up: what they refuse at once, and what they write."""

import json
import sys
from pathlib import Path

import pytest

from lvspec.evaluation.methods import EvaluationInterrupted
from lvspec.policy import AcceptancePolicy
from lvspec.shapes.tasks import TASKS

BENCH = Path(__file__).resolve().parents[2] / "bench"
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if ".begin(" in path.read_text())
ANY_PAIR = [name for name in SCRIPTS if "add_pair(" in (BENCH / f"{name}.py").read_text()]


@pytest.fixture
def start(bench, monkeypatch):
    """`start("batch", "--clips", 1)`: what `python bench/batch.py --clips 1` returns."""

    def run(name, *options):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        return bench(name).main()

    return run


def test_which_scripts_these_are():
    """All that say they have the option, and those whose question is about any pair."""
    assert set(SCRIPTS) == {
        path.stem for path in BENCH.glob("*.py") if "[--json" in path.read_text()
    }
    asked = {"ablation", "batch", "calibrate_embedded", "calibration", "drafters", "penalty"}
    assert set(ANY_PAIR) == asked | {"float8", "strict_greedy"}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("path", [".", "none/rows.json"])
def test_a_path_that_cannot_be_written(start, monkeypatch, tmp_path, capsys, name, path):
    if name in ("launches", "precompile", "sweep"):
        pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    folder = ["."] if name in ("captioning", "caption_runs") else []
    with pytest.raises(SystemExit) as end:
        start(name, *folder, "--json", path)
    assert end.value.code == 2
    assert "error: --json: expected " in capsys.readouterr().err


@pytest.mark.parametrize("name", ANY_PAIR)
def test_a_pair_that_is_none_ends_it_at_once(start, capsys, name):
    with pytest.raises(SystemExit) as end:
        start(name, "--pair", "ideal")
    assert end.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "error: --pair: expected embedded, real or a folder" in said and "got ideal" in said


def test_fidelity_to_a_target_that_has_nothing_right(bench):
    script = bench("measuring.script")
    row = {"fidelity": {"attributes": 0.98765, "captions": None}}
    assert script.of_target(row) == "98.77% / -"


OPTIONS = {
    "ablation": ("--calibration-clips", 1, "--gates", "others"),
    "batch": ("--batches", 1),
    "calibrate_embedded": (),
    "drafters": ("--only", "n-grams, strict"),
    "embedded_pair": (),
    "penalty": (),
    "shifts": ("--only", "swapped"),
    "phases": (),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_figures_are_written(start, tmp_path, capsys, name):
    """Each on one clip of the embedded pair, with its policy."""
    path = tmp_path / "rows.json"
    assert not start(name, "--clips", 1, "--json", path, *OPTIONS[name])
    found = json.loads(path.read_text())
    assert found["environment"]["threads"] == 1
    if name in ANY_PAIR:
        assert found["pair"] == "embedded"
    rows = found["rows"] if "rows" in found else [found["lvspec"]]
    assert rows and capsys.readouterr().out


@pytest.mark.slow
def test_a_calibration_is_applied_to_other_clips(start, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ("--calibrations", 1, "--clips", 4, "--sets", 2, "--unseen", 1, "--fidelity", 0.1)
    assert not start("calibration", *options, "--json", "rows.json")
    found = json.loads(Path("rows.json").read_text())
    assert found["summary"]["sets"] == len(found["rows"]) == 2
    assert found["rows"][0]["tau"]["predicted"] > 1 and len(found["calibrated"]) == 1
    kept = Path("calibration", "captions.jsonl").read_bytes()
    assert not start("calibration", *options)  # nothing is left to do
    assert Path("calibration", "captions.jsonl").read_bytes() == kept and capsys.readouterr().out


@pytest.mark.slow
def test_an_ablation_that_is_interrupted_says_what_is_complete(start, bench, monkeypatch, tmp_path):
    script, path = bench("ablation"), tmp_path / "rows.json"
    whole = script.run_methods

    def run(methods, clips):
        raise EvaluationInterrupted(whole(methods, clips[:1]))

    monkeypatch.setattr(script, "run_methods", run)
    options = ("--clips", 2, "--calibration-clips", 1, "--only", "strict", "--json", path)
    assert start("ablation", *options, "--lines", tmp_path / "lines") == 0
    found = json.loads(path.read_text())
    assert [row["method"] for row in found["rows"]] == ["autoregression", "strict"]
    assert found["clips"] == 1 and len((tmp_path / "lines").read_text().splitlines()) == 2


def test_no_policy_is_set_for_a_pair(bench):
    setup = bench("pairs.trained").Trained("real", TASKS["real"], None)
    strict, loose = (setup.policies()[name] for name in ("strict", "lvspec"))
    assert strict == AcceptancePolicy.strict() and setup.policies()["autoregression"] is None
    assert loose == AcceptancePolicy.lvspec()
