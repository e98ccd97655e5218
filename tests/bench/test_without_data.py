"""Iterations of real shapes on tensors without data: their kernels counted, and compiled."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = ("--context", "300")
SAFE = ("-P",) if sys.version_info >= (3, 11) else ()


def run(*command, root=ROOT, **variables):
    """A script in processes of its own: torch is made to accept a device that is not there."""
    dropped = ("LVSPEC_BACKEND", "TRITON_INTERPRET", "TRITON_CACHE_DIR")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env |= {"OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1", **variables}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=800)


COUNTED = """
import json
import sys
from dataclasses import asdict
sys.path.insert(0, "bench")
import launches
from pairs.pairs import PAIRS

tiny, pair = PAIRS["tiny"], PAIRS["qwen-7b-3b"]
whole = launches.count(tiny, gamma=2)
one, two = (
    launches.count(launches.with_layers(pair, n, 1), drafts=False, fuse="none") for n in (1, 2)
)
print(json.dumps({
    "tiny": asdict(launches.launches_of(tiny, 2)),
    "whole": {"by_name": whole.kernels, "early": whole.early, "parts": whole.parts},
    "layers": tiny.target.num_layers + 2 * tiny.draft.num_layers,
    "real": asdict(launches.launches_of(pair, 12)),
    "hf_layer": two.total - one.total,
}))
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Kernels of the tiny pair, of 7B <- 3B, and of a layer of HF's."""
    pytest.importorskip("triton")
    script = tmp_path_factory.mktemp("counted") / "counted.py"
    script.write_text(COUNTED)
    done = run(*SAFE, script)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_counts_of_few_layers_say_those_of_all(counted):
    found, whole = counted["tiny"], counted["whole"]
    assert {name: found[name] for name in whole} == whole
    assert found["iteration"] == sum(whole["by_name"].values()) > found["early"] > 0
    assert found["by_name"]["attend_kernel"] == counted["layers"]
    assert found["alone"] < found["iteration"] and found["alone_early"] < found["early"]


@pytest.mark.slow
def test_kernels_of_7b_with_3b(counted):
    """At most 9 a layer in a pass of one slot, and 4,300 an iteration; HF's own are many more."""
    found = counted["real"]
    assert found["draft_layer"] <= 9 and found["alone_layer"] <= 9, found
    assert found["iteration"] <= 4300, found["by_name"]
    assert found["parts"]["target"] == {"layers": 28, "called": 0, "compact": 0}
    assert found["parts"]["draft"] == {"layers": 36, "called": 0, "compact": 0}
    assert counted["hf_layer"] > 30, "the count would see them"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cache_is_used_in_another_folder(tmp_path):
    """Nothing is compiled or built a second time, by a copy of the sources elsewhere."""
    pytest.importorskip("triton")
    if shutil.which("gcc") is None and shutil.which("clang") is None:
        pytest.skip("a C compiler is needed")
    cache, carried = tmp_path / "cache", tmp_path / "carried"
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    made = ("bench/precompile.py", "tiny", *CONTEXT, "--gamma", "1", "--cache")
    done = run(*made, cache, "--json", first)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(first.read_text())["rows"]
    assert row["kernels"] > 15 and len(row["compiled"]) == row["kernels"] and row["built"]

    other = tmp_path / "elsewhere" / "checkout"
    for name, to in (("bench", "bench"), ("lvspec", "lvspec"), ("kernels", "lvspec/kernels")):
        shutil.copytree(
            ROOT / name,
            other / to,
            ignore=shutil.ignore_patterns("__pycache__", "*.mp4", "results"),
        )
    cache.rename(carried)
    done = run(*made, carried, "--json", second, root=other, PYTHONPATH=str(other))
    assert done.returncode == 0, done.stderr[-3000:]
    (again,) = json.loads(second.read_text())["rows"]
    assert again["compiled"] == [] and again["kernels"] == row["kernels"]
    assert again["built"] == []


def test_a_cache_of_another_triton_is_refused_at_once(bench, tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    precompile = bench("precompile")

    def check():
        monkeypatch.setattr(sys, "argv", ["precompile.py", "--use", "--cache", str(tmp_path)])
        return precompile.main(), capsys.readouterr().out

    code, said = check()
    assert code == 1 and "expected the folder of a cache, got FileNotFoundError" in said
    made = precompile.made_with()
    (tmp_path / precompile.FILE).write_text(json.dumps(made))
    assert check() == (0, f"{tmp_path}: fits\n")
    made |= {"libtriton": "0" * 64, "python": ".cpython-39.so"}
    (tmp_path / precompile.FILE).write_text(json.dumps(made))
    code, said = check()
    assert code == 1 and f"got {'0' * 64}" in said and "python: expected" in said


def test_triton_finds_what_a_cache_has_wherever_it_is(bench, tmp_path, monkeypatch):
    """Which files belong to a kernel Triton keeps by their paths: those where they are now."""
    cache_of = pytest.importorskip("triton.runtime.cache").get_cache_manager
    precompile, key = bench("precompile"), "00" * 32
    there, here = tmp_path / "there", tmp_path / "here"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(there))
    manager = cache_of(key)
    files = {name: manager.put(name, name) for name in ("a_kernel.json", "a_kernel.cubin")}
    manager.put_group("a_kernel.json", files)
    (there / precompile.FILE).write_text(json.dumps(precompile.made_with()))

    there.rename(here)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(here))
    assert not cache_of(key).get_group("a_kernel.json")
    monkeypatch.setattr(sys, "argv", ["precompile.py", "--use", "--cache", str(here)])
    assert precompile.main() == 0
    found = cache_of(key).get_group("a_kernel.json")
    assert found.keys() == files.keys()
    assert all(Path(path).read_text() == name for name, path in found.items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_rows_launch_has_been_compiled(tmp_path):
    """Every launch of e2e.py's methods is one of those without data, in all that decides a key."""
    pytest.importorskip("triton")
    script, found = ROOT / "tests" / "support" / "launches_seen.py", {}
    interpreted = {"LVSPEC_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    for way, variables in (("rows", interpreted), ("without-data", {})):
        done = run(*SAFE, script, way, tmp_path / way, **variables)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        found[way] = json.loads((tmp_path / way).read_text())

    def is_compiled(kernel, kinds):
        return any(
            kernel == other and all(of_other[name] in (kind, "any") for name, kind in kinds.items())
            for other, of_other in found["without-data"]
        )

    assert {kernel for kernel, _ in found["rows"]} > {"attend_kernel", "merge_kernel"}
    assert any(kinds.get("PIECE") == 0 for _, kinds in found["rows"]), "there is a split plan"
    assert [launch for launch in found["rows"] if not is_compiled(*launch)] == []
