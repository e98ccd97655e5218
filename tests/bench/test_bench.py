"""bench/: its scripts run on the CPU, refuse wrong results, and write the figures they promise."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lvspec import ops
from lvspec.policy import AcceptancePolicy

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
# By its path: as a module it would have the root, and our kernels/, on `sys.path`.
PYTEST = (sys.executable, Path(pytest.__file__).with_name("__main__.py"))
OPERATIONS = {
    "verify_attention",
    "logit_stats",
    "accept",
    "accept_sampled",
    "gate",
    "commit_kv",
    "visual_importance",
    "expand_tree",
    "scaled_linear",
}
FIGURES = {"bytes", "limit_ms", "gb_per_s", "share_of_copy", "launch_ms", "median_ms"}


def run(*command, **variables):
    """A command in the root, with the backend that the CPU has by itself."""
    dropped = ("LVSPEC_BACKEND", "TRITON_INTERPRET", "PYTHONPATH", "PYTEST_ADDOPTS")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    # Nothing is timed in a worker of xdist's; what is started here is none.
    env = {key: value for key, value in env.items() if not key.startswith("PYTEST_XDIST")}
    env |= {"OMP_NUM_THREADS": "1", **variables}
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


def run_benchmarks(*options, **variables):
    pytest_here = (*PYTEST, "-q", "--bench-device=cpu")
    return run(*pytest_here, *sorted(BENCH.glob("ops/bench_*.py")), *options, **variables)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "micro.json"
    done = run_benchmarks(f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.mark.slow
def test_every_operation_has_a_benchmark_and_its_figures(results):
    document = json.loads(results.read_text())
    facts = document["machine_info"]["lvspec"]
    assert {"commit", "torch", "device_name"} <= facts["environment"].keys()
    assert facts["limits"]["copy_gb_per_s"] > 0
    assert "node" not in document["machine_info"]
    found = set()
    for benchmark in document["benchmarks"]:
        info = benchmark["extra_info"]
        found.add(info["operation"])
        assert FIGURES <= info.keys()
        assert info["bytes"] > 0 and info["p20_ms"] <= info["median_ms"] <= info["p80_ms"]
        for peer in info["peers"].values():
            assert ("median_ms" in peer) != ("unavailable" in peer)
    assert found == OPERATIONS


@pytest.mark.slow
def test_peers_run(results):
    """Those that PyTorch alone can be, on at least one case each."""
    document = json.loads(results.read_text())
    measured = {
        name
        for benchmark in document["benchmarks"]
        for name, peer in benchmark["extra_info"]["peers"].items()
        if "median_ms" in peer
    }
    expected = {"eager, weights", "sdpa", "sdpa grouped", "torch", "specvlm", "fly", "index_copy"}
    expected |= {"not quantised"}
    assert measured >= expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason"), [((), "measured with --compile"), (("--compile",), "for CUDA only")]
)
def test_what_takes_long_to_compile_is_measured_if_asked_for(tmp_path, options, reason):
    path = tmp_path / "micro.json"
    files = [BENCH / "ops" / f"bench_{name}.py" for name in ("verify_attention", "logit_stats")]
    options = ("-k", "s1-b1-chain", *options, f"--benchmark-json={path}")
    done = run(*PYTEST, "-q", "--bench-device=cpu", *files, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    peers = {}
    for benchmark in json.loads(path.read_text())["benchmarks"]:
        peers |= benchmark["extra_info"]["peers"]
    for name in ("flex_attention", "torch.compile"):
        assert reason in peers[name]["unavailable"]
    assert "median_ms" in peers["sdpa"] and "median_ms" in peers["torch"]


@pytest.mark.slow
def test_text_tables(results, tmp_path):
    path = tmp_path / "correctness.json"
    script = (BENCH / "correctness.py", "--device", "cpu", "--operations", "commit_kv")
    done = run(sys.executable, *script, "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(sys.executable, BENCH / "report.py", results, path, tmp_path / "missing.json")
    assert done.returncode == 0, done.stderr
    assert OPERATIONS <= set(done.stdout.split())
    assert "FileNotFoundError" in done.stdout and "commit_kv            18 ok" in done.stdout


SPOIL = """
import dataclasses, torch
from lvspec import ops

def spoiled(name, ops=ops):
    original = getattr(ops, name)
    def call(*arguments, **options):
        result = original(*arguments, **options)
        fields = [result] if isinstance(result, torch.Tensor) else list(result)
        index = torch.zeros(fields[-1].dim(), dtype=torch.long).tolist()
        fields[-1][tuple(index)] += 1
        return result
    setattr(ops, name, call)

for name in ("verify_attention", "logit_stats", "accept", "accept_sampled", "gate",
             "visual_importance", "expand_tree"):
    spoiled(name)
spoiled("scaled_linear", torch.ops.lvspec)
ops.commit_kv = lambda *arguments: None
"""


@pytest.mark.slow
def test_a_wrong_result_is_not_timed(tmp_path):
    (tmp_path / "spoil.py").write_text(SPOIL)
    path = tmp_path / "micro.json"
    options = ("-p", "spoil", f"--benchmark-json={path}", "--no-peers", "--tb=line")
    done = run_benchmarks(*options, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    document = json.loads(path.read_text())
    timed = {benchmark["name"] for benchmark in document["benchmarks"]}
    # Only commits that move nothing are right without doing anything.
    assert timed and all(name.startswith("test_commit_kv") for name in timed)
    assert not any("s9" in name and "tree" in name for name in timed)


@pytest.mark.parametrize(
    "peer, policy, trees", [("specvlm", "strict", (0, 1)), ("fly", "fly", (0,))]
)
def test_acceptance_peers_accept_what_we_do(bench, peer, policy, trees):
    """The comparison is of like with like: the same number of tokens under the same rule."""
    cases, case_inputs = bench("ops.cases"), bench("ops.case_inputs")
    policy, counts = AcceptancePolicy.preset(policy), []
    for slots, tree in itertools.product((2, 9, 33), trees):
        case = cases.Case(cases.SMALL, 0, slots, 40, tree)
        inputs = case_inputs.accept_inputs(case, torch.device("cpu"), torch.float32)
        theirs = bench("ops.peers").ACCEPT[peer](case, inputs)()
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        ours = ops.accept(*inputs, policy).num_accepted
        assert torch.equal(ours.long(), theirs.long()), (case, ours, theirs)
        counts.append(ours.float().mean().item())
    assert max(counts) > 1


def test_gpu_script_explains_itself(tmp_path):
    assert run("bash", "-n", BENCH / "gpu.sh").returncode == 0
    done = run("bash", BENCH / "gpu.sh", "--help")
    assert done.returncode == 0 and "PAIRS=" in done.stdout
    done = run("bash", BENCH / "gpu.sh", "macro")
    assert done.returncode == 2 and "got macro" in done.stderr


def test_gpu_script_adds_to_the_path_and_begins_with_attention(tmp_path):
    """A stand-in for Python says what it is given: packages that PYTHONPATH names stay in reach."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "PATH $PYTHONPATH WORDS $*"\n')
    python.chmod(0o755)
    variables = {"DEVICE": "cuda", "OUT": str(tmp_path / "out"), "PYTHON": str(python)}
    command = ("bash", BENCH / "gpu.sh", "correctness", "micro")
    done = run(*command, PYTHONPATH="packages:more", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    said = (tmp_path / "out" / "cuda-gpu.log").read_text().splitlines()
    (operations,) = [s for s in said if s.startswith("PATH") and "default_device" in s]
    assert operations.startswith("PATH bench:packages:more WORDS")
    (micro,) = [s for s in said if s.startswith("PATH") and "--benchmark-json" in s]
    files = [word for word in micro.split() if word.startswith("bench/ops/bench_")]
    assert files[0] == "bench/ops/bench_verify_attention.py"
    benchmarks = (path.name for path in BENCH.glob("ops/bench_*.py"))
    assert sorted(files) == sorted(f"bench/ops/{name}" for name in benchmarks)


@pytest.mark.slow
def test_gpu_script_without_a_gpu(tmp_path):
    variables = {"DEVICE": "cpu", "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = run("bash", BENCH / "gpu.sh", "profile", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "cpu-gpu.log",
        "cpu-profile.json",
        "cpu-summary.txt",
    }
    assert "hf sdpa, 13 rows" in done.stdout
    assert "gaps within a replayed iteration: not measured" in done.stdout


@pytest.mark.slow
def test_gpu_script_looks_for_the_sanitizer(tmp_path):
    variables = {"DEVICE": "cpu", "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = run("bash", BENCH / "gpu.sh", "sanitize", **variables)
    assert done.returncode == 0 and "compute-sanitizer is not here" in done.stdout


@pytest.mark.slow
def test_operation_tests_run_on_a_named_device():
    """The plugin that takes the tests of the operations to a GPU, here to the CPU."""
    pytest_here = (*PYTEST, "-q", "-p", "ops.default_device")
    variables = {"PYTHONPATH": str(BENCH), "LVSPEC_TEST_DEVICE": "cpu"}
    done = run(*pytest_here, "tests/ops/test_commit_kv.py", "-k", "float8", **variables)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def limits(bench):
    return bench("limits")


@pytest.mark.parametrize(
    "model, gigabytes, kibibytes",
    [
        ("QWEN_3B", 6.2, 36),
        ("QWEN_7B", 14.1, 56),
        ("QWEN_32B", 64.0, 256),
        ("LLAVA_05B", 1.0, 12),
        ("LLAVA_7B", 14.1, 56),
        ("LLAVA_72B", 142.9, 320),
    ],
)
def test_bytes_of_the_models(limits, model, gigabytes, kibibytes):
    """As counted from the checkpoints: weights that a pass reads, and cache of a token."""
    shape = getattr(limits, model)
    assert limits.parameters(shape)[0] * 2e-9 == pytest.approx(gigabytes, rel=0.02)
    assert limits.kv_bytes(shape) == kibibytes * 1024


def test_limit_written_by_hand(limits):
    """Bandwidth 1 and no gaps: times are bytes."""
    gpu = limits.Gpu("unit", bandwidth=1.0, memory=1e15, flops=1e30)
    setting = limits.Setting(
        limits.QWEN_7B, limits.QWEN_3B, gpu, context=1000, gamma=4, tau=3.0, gap=0.0
    )
    target = 2 * limits.parameters(limits.QWEN_7B)[0] + 1000 * 57344
    draft = 2 * limits.parameters(limits.QWEN_3B)[0] + 1000 * 36864
    found = limits.limit(setting)
    assert found.iteration_ms == pytest.approx(1e3 * (target + 4 * draft))
    assert found.autoregression_ms == pytest.approx(1e3 * target)
    assert found.speedup == pytest.approx(3 * target / (target + 4 * draft))
    assert found.fits
    halved = limits.limit(replace(setting, gpus=2, reduction=0.0))
    assert halved.iteration_ms == pytest.approx(found.iteration_ms / 2)
    assert not limits.limit(replace(setting, gpu=replace(gpu, memory=2e10))).fits
    gapped = replace(setting, gap=1.0, fuse="none")
    launches = 41 * (28 + 4 * 36) + 5 * 28 + limits.LAUNCHES_PER_ITERATION
    assert limits.limit(gapped).gaps_ms == pytest.approx(1e3 * launches)
    assert limits.limit(replace(gapped, fuse="kernels")).gaps_ms < limits.limit(gapped).gaps_ms / 2


def test_best_gamma(limits):
    """A draft that is never right is asked once, one that always is as often as can be."""
    setting = limits.Setting(limits.LLAVA_7B, limits.LLAVA_05B, limits.GPUS["h100"])
    assert limits.best_gamma(setting, 0.0)[0] == 1
    assert limits.best_gamma(setting, 1.0)[0] == 63
    assert 1 < limits.best_gamma(setting, 0.8)[0] < limits.best_gamma(setting, 0.95)[0] < 63


def test_limits_are_written(limits, tmp_path, monkeypatch):
    path = tmp_path / "limits.json"
    command = ["limits.py", "--context", "4096", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    assert limits.main() == 0
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 5
    assert all(row["iteration_ms"] > row["target_ms"] > row["draft_step_ms"] > 0 for row in rows)


@pytest.mark.slow
def test_draft_cost(tmp_path):
    """Fewer tokens are fewer bytes, by what their rows hold."""
    path = tmp_path / "cost.json"
    options = ("--layers", 1, "--tokens", 64, "--rounds", 1, "--context", 16, "--json", path)
    done = run(sys.executable, BENCH / "draft_cost.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "whole head" in done.stdout and "64 tokens" in done.stdout
    whole, few = json.loads(path.read_text())["rows"]
    assert whole["bytes"] - few["bytes"] == 4 * 896 * (151936 - 64)
    assert whole["ms"] > few["ms"] > 0
