"""The two calls of bench/gpu.sh, what they are compared with, and what a kill loses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"target": {"layers": 28, "called": 0}, "draft": {"layers": 36, "called": 0}}


def test_prediction_by_hand(bench):
    """Bytes over bandwidth and the kernels' own time; what must be accepted follows."""
    limits, paper = bench("limits"), bench("paper.predictions")
    gpu = limits.Gpu("unit", bandwidth=1e12, memory=1e15, flops=1e30)
    setting = limits.Setting(limits.QWEN_7B, limits.QWEN_3B, gpu, context=1000, gamma=4)
    found = paper.predict(setting, kernels=5000, early=3000, alone_kernels=400)
    own, early = 1e3 * paper.KERNEL_SECONDS, 1e3 * paper.EARLY_SECONDS
    target = 2e-9 * limits.parameters(limits.QWEN_7B)[0] + 1000 * 57344e-9
    draft = 2e-9 * limits.parameters(limits.QWEN_3B)[0] + 1000 * 36864e-9
    assert found.limit_ms == pytest.approx(target + 4 * draft)
    assert found.estimate_ms == pytest.approx(target + 4 * draft + 5000 * own)
    assert found.early_ms == pytest.approx(target + 4 * draft + 2000 * own + 3000 * early)
    assert found.alone_ms == pytest.approx(target + 400 * own)
    assert found.tau_for_3x == pytest.approx(3 * found.estimate_ms / found.alone_ms)
    assert found.tau_for_2x == pytest.approx(found.tau_for_3x * 2 / 3) and found.fits


def test_what_was_predicted_of_a_pair(bench, tmp_path):
    expected, path = bench("pairs.expected"), tmp_path / "predictions.json"
    assert expected.prediction("qwen-7b-3b", 12, path) is None
    row = {"pair": "qwen-7b-3b", "context": 4096, "kernels": 6000, "parts": PARTS}
    path.write_text(json.dumps({"gamma": 12, "rows": [row]}))
    assert expected.prediction("qwen-7b-3b", 12, path) == row
    assert expected.prediction("qwen-7b-3b", 8, path) is None
    assert expected.prediction("tiny", 12, path) is None


def test_parts_that_vanish_fail_a_row(bench, capsys):
    other_parts = bench("pairs.expected").other_parts
    assert other_parts(PARTS, PARTS) == other_parts({"target": PARTS["target"]}, PARTS) == []
    fewer = {**PARTS, "draft": {"layers": 0, "called": 36}}
    (said,) = other_parts(fewer, PARTS)
    assert said.startswith("draft: expected") and said.endswith("got {'layers': 0, 'called': 36}")

    module = bench("pairs.e2e_report")
    report = module.Report(None, dict.fromkeys(module.RUN, ""))
    measured = {"wall_ms": 1.0, "other_parts": []}
    row = {"label": "a", "context": 1, "batch": 1, "replayed": "", "checks": {}}
    report.show({**row, "methods": {"lvspec": measured}}, ["lvspec"])
    assert not report.failed
    report.show({**row, "methods": {"lvspec": {**measured, "other_parts": [said]}}}, ["lvspec"])
    assert report.failed and said in capsys.readouterr().out


def test_kernels_of_a_layer(bench):
    """Three iterations of 100 layers' passes: a copy in every layer shows, by its name."""
    kernels = [{"name": "gemm", "count": 2100}, {"name": "a copy", "count": 300}]
    found = bench("pairs.expected").kernels_a_layer(kernels, 3, 100)
    assert found == {"gemm": 7.0, "a copy": 1.0}


def call(name, folder, python, **variables):
    environment = {**os.environ, "OUT": str(folder), "PYTHON": str(python), **variables}
    command = ["bash", "bench/gpu.sh", name]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_call_goes_on_where_it_ended(tmp_path, name):
    """A stand-in for Python fails at the profile, once; then it alone is left to do."""
    python, out = tmp_path / "python", tmp_path / "out"
    once = tmp_path / "failed"
    python.write_text(
        f"""#!/bin/sh
case "$*" in *profile_step*) [ -e {once} ] || {{ touch {once}; exit 3; }};; esac
echo "WORDS $*"
"""
    )
    python.chmod(0o755)
    options = {"DEVICE": "cuda", "CACHE": str(tmp_path / "none")}
    done = call(name, out, python, **options)
    assert done.returncode == 1 and "exit code 3" in done.stdout, done.stdout + done.stderr
    steps = [line for line in done.stdout.splitlines() if "exit code 0" in line]
    assert len(steps) == 5, done.stdout
    said = (out / f"cuda-gpu-{name}.log").read_text().splitlines()
    (tests,) = [line for line in said if line.startswith(("#### chains:", "#### operations:"))]
    assert "LVSPEC_BACKEND=triton" in tests and "-n 8" in tests
    assert len(list(out.iterdir())) <= 8 and (out / "triton-cache.tar.gz").exists()
    again = call(name, out, python, **options)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done before") == len(steps)
    assert again.stdout.count("exit code") == 1


def test_what_a_kill_leaves_half_written_does_not_travel(tmp_path):
    """Killed in the middle of writing: of an earlier call, and in this one."""
    python, out = tmp_path / "python", tmp_path / "out"
    out.mkdir()
    (out / ".0123.part").write_text("earlier")
    python.write_text(
        """#!/bin/sh
case "$*" in
    *facts*) ls -A "$OUT" | grep part ;;
    *e2e.py*) echo half >"$OUT/.4567.part"; kill -KILL $$ ;;
    *profile_step*) ls -A "$OUT" | grep part ;;
esac
exit 0
"""
    )
    python.chmod(0o755)
    done = call("first", out, python, DEVICE="cuda", CACHE=str(tmp_path / "none"))
    assert done.returncode == 1 and "e2e, 7B <- 3B: exit code 137" in done.stdout
    assert not list(out.glob(".*")) and len(list(out.iterdir())) <= 8
    assert ".part" not in (out / "cuda-gpu-first.log").read_text()


def test_nothing_needs_to_be_installed(tmp_path):
    """The sources are found, kernels/ in its place, and nothing is left of what links to them."""
    python, found = tmp_path / "python", tmp_path / "found"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
    *find_spec*) exit 1 ;;
    *facts.py*) cd /; exec {sys.executable} {tmp_path / "look.py"} ;;
esac
"""
    )
    python.chmod(0o755)
    (tmp_path / "look.py").write_text(
        "import lvspec\nimport lvspec.kernels\n"
        f"with open({str(found)!r}, 'w') as file:\n"
        "    print(lvspec.__file__, lvspec.kernels.__file__, file=file)\n"
    )
    done = call("first", tmp_path / "out", python, DEVICE="cuda", CACHE=str(tmp_path / "none"))
    assert "not installed" in done.stdout and "facts: exit code 0" in done.stdout, done.stdout
    package, kernels = map(Path, found.read_text().split())
    assert not package.is_relative_to(ROOT) and kernels.is_relative_to(package.parent)
    assert not package.parent.exists()


def test_a_cache_that_does_not_fit_is_said_at_once(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *precompile*) echo "libtriton: expected a, got b"; exit 1;; esac\n'
    )
    python.chmod(0o755)
    done = call("first", tmp_path / "out", python, DEVICE="cuda", CACHE=str(tmp_path))
    assert done.returncode == 1
    said = done.stdout.splitlines()
    wrong = said.index("libtriton: expected a, got b")
    assert wrong < next(i for i, line in enumerate(said) if line.startswith("facts:"))


@pytest.mark.slow
def test_a_kill_loses_one_method(tmp_path):
    """SIGKILL while the third method runs: the first two stand in the file, and are not redone."""
    path = tmp_path / "e2e.json"
    command = [sys.executable, "bench/e2e.py", "pairs", "--device", "cpu", "--pair", "tiny"]
    command += ["--context", "60", "--batch", "1", "--iterations", "3", "--no-peers"]
    command += ["--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def measured():
        rows = json.loads(path.read_text())["pairs"] if path.exists() else []
        methods = rows[0].get("methods", {}) if rows else {}
        return {name: found["wall_ms"] for name, found in methods.items() if "wall_ms" in found}

    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **silent)
    end = time.monotonic() + 120
    while len(measured()) < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = measured()
    assert list(before)[:2] == ["lvspec", "autoregression"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120, **silent)
    assert len(measured()) == 4 and measured().items() >= before.items()


KILLED = """
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, "bench")
import e2e
from measuring import timing
from pairs import measure

import lvspec.environment as files

PATH, RUN = Path(sys.argv[1]), sys.argv[2:]
timing.copy_bandwidth = lambda device: 1e9
timing.device_facts = lambda device: {"copy_gb_per_s": 1.0, "read_gb_per_s": 1.0}


def measured():
    rows = json.loads(PATH.read_text())["pairs"] if PATH.exists() else []
    found = rows[0].get("methods", {}) if rows else {}
    return {name: its["wall_ms"] for name, its in found.items() if "wall_ms" in its}


def run(end, kept):
    \"\"\"In a process that is killed at this moment: (signal, methods that have ended).\"\"\"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        moments, plain = iter(range(10**6)), os.replace

        def moment():
            if next(moments) == end:
                os.kill(os.getpid(), signal.SIGKILL)

        def method(name):
            def measure(row):
                assert name not in kept, "measured twice"
                moment()
                os.write(write, f"{name}\\n".encode())
                moment()
                return {"wall_ms": 1.0 + end, "loop": "", "limit_ms": 1.0, "share_of_limit": 1.0}

            return measure

        def replace(partial, file):
            moment()
            plain(partial, file)
            moment()

        def write_bytes(path, content, plain=Path.write_bytes):
            plain(path, content[: len(content) // 2])
            moment()
            return plain(path, content)

        os.replace, Path.write_bytes = replace, write_bytes
        measure.METHODS.update({name: method(name) for name in measure.METHODS})
        sys.argv = ["e2e.py", *RUN, "--json", str(PATH)]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            code = e2e.main()
        finally:
            os._exit(code)
    os.close(write)
    ended = os.fdopen(read).read().split("\\n")[:-1]
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), ended


end, code = 0, -signal.SIGKILL
while code == -signal.SIGKILL:  # at every moment of a run, each a run from the beginning
    PATH.unlink(missing_ok=True)
    code, ended = run(end, {})
    kept = measured()
    assert list(kept) == ended[: len(kept)] and len(kept) >= len(ended) - 1, (end, ended, kept)
    if end % 5 == 0:
        assert run(10**6 + end, kept) == (0, [name for name in measure.OURS if name not in kept])
        assert {name: measured()[name] for name in kept} == kept
    end += 1
assert code == 0 and len(ended) == len(measure.OURS)
print(end - 1)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment(tmp_path):
    """At the beginning and end of every method, and before, within and behind every write."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), str(script)]
    command += [str(tmp_path / "e2e.json"), "pairs", "--device", "cpu", "--pair", "tiny"]
    command += ["--context", "60", "--batch", "1", "--iterations", "1", "--no-peers"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 4 * 4, "four moments of each of four methods, and more"


def test_predictions_that_are_committed(bench):
    """Of every pair that is asked for, its parts and its kernels."""
    paper, expected = bench("paper.predictions"), bench("pairs.expected")
    document = json.loads(expected.PREDICTIONS.read_text())
    assert list(dict.fromkeys(row["pair"] for row in document["rows"])) == paper.PREDICTED
    for row in document["rows"]:
        assert row["parts"].keys() == PARTS.keys()
        assert row["kernels"] > row["alone_kernels"] > 0 and row["kernels"] > row["early"] > 0
        assert row["limit_ms"] < row["early_ms"] < row["estimate_ms"] and 1 < row["tau_for_2x"]
    seven = next(row for row in document["rows"] if row["pair"] == "qwen-7b-3b")
    assert seven["kernels"] <= 4300


def test_a_profile_stands_before_its_steps_are_timed(bench, tmp_path, monkeypatch):
    profile_step, path = bench("profile_step"), tmp_path / "profile.json"

    def fails(engine):
        raise TypeError("a version of HF's")

    monkeypatch.setattr(profile_step, "step_times", fails)
    words = ["--device", "cpu", "--pair", "tiny", "--context", "60", "--gamma", "2"]
    monkeypatch.setattr(sys, "argv", ["profile_step.py", *words, "--json", str(path)])
    with pytest.raises(TypeError):
        profile_step.main()
    found = json.loads(path.read_text())
    assert found["kind"] == "profile" and found["gaps"]["replays"] == 0 and found["steps"] == {}


def test_checks_that_were_made_stand(bench, tmp_path, monkeypatch):
    """What a limit interrupts has the rows that it got to, and says how many are missing."""
    correctness, path = bench("correctness"), tmp_path / "correctness.json"
    plain, done = correctness.run_task, []

    def interrupted(task):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(plain(task))
        return done[-1]

    monkeypatch.setattr(correctness, "run_task", interrupted)
    words = ["--device", "cpu", "--operations", "gate", "accept", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["correctness.py", *words])
    with pytest.raises(KeyboardInterrupt):
        correctness.main()
    document = json.loads(path.read_text())
    assert document["rows"] == sum(done, []) != []
    said = bench("measuring.text_tables").correctness(document)
    missing = document["num_checks"] - len(document["rows"])
    assert said[-1] == f"interrupted: {missing} checks were not reached" and missing > 0


def test_a_profile_without_kernels_says_so(bench, capsys):
    """Where a device's profiler sees nothing."""
    gaps = bench("measuring.gaps").describe({"traceEvents": []})
    value = {"label": "a pair", "context": 1, "batch": 1, "loop": "graph", "steps": {}}
    value |= {"gaps": gaps, "kernels_a_layer": {}, "expected_kernels": 70, "layer_passes": 7}
    device = torch.device("cuda")
    bench("profile_step").show({**value, "iterations": 3}, device, torch.bfloat16)
    said = capsys.readouterr().out
    assert "0.00 kernels a layer" in said and "70 expected, 10.00 a layer" in said
    assert "not measured of an iteration, not measured of all 3" in said
