"""bench/report.py: JSON as tables of bench/README.md, plots, text; what is missing is said."""

import copy
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]

METHOD = {"wall_ms": 40.0, "median_ms": 39.0, "p20_ms": 38.0, "p80_ms": 41.0, "iterations": 20}
LIMIT = {"bytes": 1e11, "limit_ms": 32.0, "share_of_limit": 0.8, "loop": "graph"}
ROW = {
    "pair": "qwen-7b-3b",
    "label": "qwen2.5-vl-7b <- qwen2.5-vl-3b",
    "context": 16384,
    "batch": 1,
    "gamma": 12,
    "tau": 11.27,
    "replayed": "replayed tau = 11.27 (embedded pair, lvspec)",
    "methods": {
        "lvspec": {**METHOD, **LIMIT},
        "autoregression": {**METHOD, **LIMIT, "wall_ms": 5.0, "limit_ms": 4.4},
        "lvspec eager": {**METHOD, **LIMIT, "wall_ms": 190.0, "loop": "eager: a reason"},
        "lvspec, specvlm tree": {**METHOD, **LIMIT, "wall_ms": 21.0},
        "hf generate": {**METHOD, "wall_ms": 33.0},
        "hf assisted": {**METHOD, "wall_ms": 300.0},
        "specvlm step": {"not_measured": "out of memory"},
        "hf static, compiled": {"not_measured": "out of time"},
    },
    "checks": {"captured": "the eager loop's tokens, 74 of them"},
    "speedup": 1.41,
    "over_hf_assisted": 7.5,
}
LEFT_OUT = {
    "pair": "qwen-32b-7b",
    "label": "qwen2.5-vl-32b <- qwen2.5-vl-7b",
    "context": 16384,
    "batch": 1,
    "not_measured": "needs 95 GB, has 84 GB",
}
ENVIRONMENT = {
    "device_name": "A GPU",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "transformers": "5.17.0",
    "commit": "0123456789abcdef",
}
E2E = {
    "kind": "e2e",
    "environment": ENVIRONMENT,
    "limits": {"copy_gb_per_s": 3000.0, "read_gb_per_s": 3100.0},
    "embedded": {
        "rows": [
            {
                "method": "lvspec",
                "tokens_per_s": 1234.0,
                "speedup": 2.5,
                "tau": 11.2,
                "attributes": 1.0,
                "captions": 0.99,
            }
        ],
        "clips": 12,
        "strict_equals_hf": 12,
    },
    "pairs": [ROW, LEFT_OUT],
}
PROFILE = {
    "kind": "profile",
    "label": "qwen2.5-vl-7b <- qwen2.5-vl-3b",
    "context": 16384,
    "batch": 1,
    "loop": "graph",
    "environment": ENVIRONMENT,
    "steps": {"draft, 1 row": {"calls_ms": 8.0, "graph_ms": 2.0}},
    "gaps": {"share_within": 0.0123, "replays": 3, "kernels_of_a_replay": 5000},
    "kernels": [{"name": "gemm|wide", "ms": 20.0, "share": 0.61, "count": 900}],
}


@pytest.fixture
def folder(tmp_path):
    """A copy of bench/README.md, and a folder of results."""
    shutil.copy(ROOT / "bench" / "README.md", tmp_path)
    (tmp_path / "results").mkdir()
    return tmp_path


def write(folder, **documents):
    for name, document in documents.items():
        (folder / "results" / f"cuda-{name}.json").write_text(json.dumps(document))


@pytest.fixture
def report(bench, folder, capsys, monkeypatch):
    """`report(*options)`: the script here, with that folder."""

    def run(*options):
        places = ("--results", folder / "results", "--readme", folder / "README.md")
        words = [str(word) for word in ("report.py", *options, *places)]
        monkeypatch.setattr(sys, "argv", words)
        code = bench("report").main()
        return SimpleNamespace(returncode=code, **capsys.readouterr()._asdict())

    return run


def table(folder, name):
    """The rows of a table, as lists of cells, without the headings."""
    text = (folder / "README.md").read_text()
    begin = text.index(f"<!-- table: {name} -->\n")
    lines = text[begin : text.index("<!-- end of table -->", begin)].splitlines()[1:]
    rows = [line[2:-2].split(" | ") for line in lines if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1
    return rows[2:]


def test_the_readme_is_up_to_date(bench):
    module = bench("report")
    text = module.README.read_text()
    assert module.with_tables(text, module.load(module.RESULTS)) == text


def test_without_results_nothing_was_measured(folder, report):
    done = report("--write")
    assert done.returncode == 0, done.err
    for name in ("gpu-e2e", "gpu-peers", "gpu-profile", "gpu-embedded"):
        rows = table(folder, name)
        assert rows and all("not measured" in row for row in rows)
    assert not (folder / "results" / "plots").exists()
    assert report("--check").returncode == 0


def test_tables_of_made_up_results(folder, report):
    write(folder, e2e=E2E, profile=PROFILE)
    done = report("--check")
    assert done.returncode == 1 and "not up to date" in done.err
    assert report("--write").returncode == 0
    assert report("--check").returncode == 0
    first, second, *others = table(folder, "gpu-e2e")
    assert first == [
        *("qwen2.5-vl-7b <- qwen2.5-vl-3b", "16384", "1", "A GPU", "40.00", "80%", "190.00"),
        *("5.00", "80%", "replayed tau = 11.27 (embedded pair, lvspec)", "1.41x", "graph"),
    ]
    assert second[4] == "not measured: needs 95 GB, has 84 GB"
    assert len(others) == 4 and all(row[4] == "not measured" for row in others)
    peers = table(folder, "gpu-peers")[0]
    assert peers[4:] == [
        *("33.00", "not measured", "300.00", "7.50x", "not measured", "21.00", "not measured")
    ]
    (profile,) = table(folder, "gpu-profile")
    assert profile[4:7] == ["1.2%", "5000", "-"] and r"gemm\|wide" in profile[7]
    (embedded,) = table(folder, "gpu-embedded")
    assert embedded == ["lvspec", "1234", "2.50x", "11.20", "100.0%", "99.0%"]
    text = (folder / "README.md").read_text()
    assert "A GPU, torch 2.11.0, triton 3.6.0, transformers 5.17.0, commit 0123456789ab" in text


def test_results_of_several_runs(bench):
    """A measured row hides one that is not, whichever comes first; devices stand side by side."""
    measured = copy.deepcopy(E2E)
    measured["pairs"] = [{**ROW, "pair": "qwen-32b-7b", "label": LEFT_OUT["label"]}]
    measured["pairs"].append({**measured["pairs"][0], "label": "with an int8 draft"})
    other = copy.deepcopy(E2E)
    other["environment"]["device_name"] = "B GPU"
    rows = bench("report").pair_rows
    for documents in ([E2E, measured], [measured, E2E]):
        found = [row for row in rows(documents) if row["pair"] == "qwen-32b-7b"]
        assert [row["label"] for row in found] == [LEFT_OUT["label"], "with an int8 draft"]
        assert not any("not_measured" in row for row in found)
    found = [row["device"] for row in rows([other, E2E]) if row["pair"] == "qwen-7b-3b"]
    assert found == ["A GPU", "B GPU"]


def test_a_readme_without_a_place_for_a_table(bench):
    with pytest.raises(ValueError, match="bench/README.md: expected <!-- table: gpu-e2e -->"):
        bench("report").with_tables("# lvspec\n", [])


def test_text_of_files(folder, report):
    write(folder, e2e=E2E, profile=PROFILE, other={"a": 1})
    paths = sorted((folder / "results").glob("*.json"))
    done = report(*paths, folder / "none.json")
    assert done.returncode == 0, done.err
    assert "40.000 ms (38.00-41.00), limit 32.000 (80%), graph" in done.out
    assert "specvlm step           not measured: out of memory" in done.out
    assert "not measured: needs 95 GB, has 84 GB" in done.out
    assert "strict equals hf generate on 12 of 12 clips" in done.out
    assert "gaps within a replayed iteration: 1.2%; 3 replays" in done.out
    assert "ValueError: expected the JSON of a script" in done.out
    assert "FileNotFoundError" in done.out


def test_nothing_to_do(bench, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py"])
    with pytest.raises(SystemExit) as stopped:
        bench("report").main()
    assert stopped.value.code == 2
    assert "expected files, --write or --check" in capsys.readouterr().err


def test_plots(bench, tmp_path):
    """Two PNG files where matplotlib is, a sentence where it is not; nothing of nothing."""
    rows = bench("report").pair_rows([E2E])
    plots = bench("measuring.plots")
    assert plots.write_plots([LEFT_OUT], tmp_path / "none") == []
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="plots: expected matplotlib"):
            plots.write_plots(rows, tmp_path / "plots")
        return
    written = plots.write_plots(rows, tmp_path / "plots")
    assert [path.name for path in written] == ["speedup.png", "bandwidth.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
