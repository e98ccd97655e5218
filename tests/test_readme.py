"""What the READMEs show is run as it stands there, and what it prints is true."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lvspec.shapes.captions import judge
from lvspec.shapes.clips import write_clip
from lvspec.shapes.scenes import scenes

ROOT = Path(__file__).resolve().parent.parent
END = "end of example"
TAU = 1.3  # even of chains of one token: where gamma is not said, the clock chooses it
NUMBER = r"\d+\.\d\d"
# What stands in for weights and a device that no test has.
STAND_INS = {
    "Qwen/Qwen2.5-VL-7B-Instruct": str(ROOT / "lvspec" / "shapes" / "target"),
    "Qwen/Qwen2.5-VL-3B-Instruct": str(ROOT / "lvspec" / "shapes" / "draft"),
    'device="cuda"': 'device="cpu"',
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


def readmes():
    """Those of the tree, and not of what is installed or built in it."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "build")
        found += [Path(folder, name) for name in files if name == "README.md"]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in found}


READMES = readmes()
EXAMPLES = {
    name: found
    for name, text in READMES.items()
    if (found := re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What the examples of a README print; one after the other in one process, as each may use what
    those before it made."""
    done = {}

    def run(name):
        if name not in done:
            done[name] = outputs_of(EXAMPLES[name], tmp_path_factory.mktemp("readme"))
        return done[name]

    return run


def outputs_of(examples, folder):
    script = folder / "examples.py"
    script.write_text("".join(f"{example}\nprint({END!r})\n" for example in examples))
    quiet = [f"-Werror::{kind}Warning" for kind in ("Future", "Deprecation")]
    done = subprocess.run(
        [sys.executable, *quiet, script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in all tests
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in re.split(r"[\r\n]", done.stderr) if "Loading weights" not in line]
    assert not "".join(said).strip(), "no warning and nothing else"
    found = done.stdout.split(f"{END}\n")[:-1]
    assert len(found) == len(examples)
    return found


@pytest.fixture
def printed(outputs):
    """The lines that the example with these words in it prints, in whichever README it is."""

    def find(*words):
        places = [
            (name, index)
            for name, examples in EXAMPLES.items()
            for index, example in enumerate(examples)
            if all(word in example for word in words)
        ]
        assert len(places) == 1, f"{len(places)} examples have {words}"
        ((name, index),) = places
        return outputs(name)[index].splitlines()

    return find


def test_the_examples_are_found():
    assert sum(map(len, EXAMPLES.values())) >= 8 and "README.md" in EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_shows_what_it_does(name, outputs):
    for output in outputs(name):
        assert output.strip()
        assert "False" not in output and "nan" not in output


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)#]+)", READMES[name]):
        if not re.match(r"\w+:", link):
            assert (ROOT / name).parent.joinpath(link).exists(), link


def taus(lines, pattern=""):
    """Of lines that match, each with one."""
    found = [re.fullmatch(rf"{pattern}tau ({NUMBER}).*", line) for line in lines]
    assert all(found), lines
    return [float(match[1]) for match in found]


def test_a_caption(printed):
    caption, counts = printed("AcceptancePolicy.lvspec()", "print(result.text)")
    assert judge(caption, scenes("evaluation", 1)[0])[2], caption
    assert taus([counts])[0] > 8


def test_a_pair_of_ones_own(tmp_path):
    """The lines for a GPU and weights of gigabytes, with the embedded pair on a CPU instead."""
    (example,) = re.findall(r"```py\n(.*?)```", READMES["README.md"], flags=re.DOTALL)
    for name, stand_in in STAND_INS.items():
        assert example.count(name) == 1
        example = example.replace(name, stand_in)
    scene = scenes("evaluation", 1)[0]
    write_clip(scene, tmp_path / "clip.mp4")
    (printed,) = outputs_of([example], tmp_path)
    lines = printed.splitlines()
    assert re.fullmatch(rf"strict tau {NUMBER} eager: .+ none regret 0\.00", lines[0])
    assert re.fullmatch(rf"lvspec tau {NUMBER} eager: .+ on regret {NUMBER}", lines[2])
    assert all(judge(caption, scene)[2] for caption in lines[1::2]) and len(lines) == 4


def test_the_front_page_is_short():
    """A screen or three, and no table of what is not known."""
    assert len(READMES["README.md"].splitlines()) <= 180
    assert "not measured" not in READMES["README.md"]


def test_captions_of_several(printed):
    lines = printed("generate_many(\n", "result.index")
    assert min(taus(lines, r"\d ")) > TAU
    for index, line in enumerate(lines):
        assert re.fullmatch(rf"{index} tau {NUMBER} (the|this) [a-z. ]+", line)
    assert len(lines) == 6
    lines = printed("lvspec.Decoder(")
    assert min(taus(lines)) > TAU and len(lines) == 3
    assert all(re.fullmatch(rf"tau {NUMBER} (graph|eager: .+)", line) for line in lines)


def test_ways_to_draft(printed):
    """That each says the target's tokens is asserted in the examples."""
    lines = printed("ways = {")
    assert len(lines) == 11
    assert min(taus(lines, r"[^:]+: ")) > 1
    lines = printed("draft_vocab=")
    assert len(lines) == 2 and min(taus(lines, r"\d+ tokens, gamma \d+: ")) > TAU


def test_a_sample_that_stops(printed):
    caption, counts = printed("stop_strings=")
    assert taus([counts])[0] > 1
    assert " background" not in caption[: -len(" background")]


def test_inside_hf(printed):
    assert printed("custom_generate=") == ["HF's own tokens: True"]


def test_methods_side_by_side(printed):
    lines = printed("lvspec.evaluate(")
    found = [
        re.fullmatch(rf"([a-z]+): tau ({NUMBER}), own (1\.000|0\.\d+) .*", line) for line in lines
    ]
    assert [match[1] for match in found] == ["autoregression", "strict", "lvspec"]
    tau = [float(match[2]) for match in found]
    assert tau[0] == 1 < tau[1] < tau[2] and found[1][3] == "1.000"


def run_in_shell(name, folder):
    """What each line of this README's first `sh` block printed; all of them do all they should."""
    block = re.search(r"```sh\n(.*?)```", READMES[name], re.DOTALL)[1]
    printed = []
    for line in block.splitlines():
        words = shlex.split(line)
        assert words.pop(0) == "lvspec"
        command = [sys.executable, "-c", "from lvspec.cli import main; raise SystemExit(main())"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
        done = subprocess.run(
            [*command, *words], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    return printed


def test_two_processes_in_the_shell(tmp_path):
    """The first one prints, and what it prints is the caption."""
    (line,) = re.findall(r"^torchrun (.*--tensor-parallel)$", READMES["lvspec/README.md"], re.M)
    scene = scenes("evaluation", 1)[0]
    write_clip(scene, tmp_path / "clip.mp4")
    port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # any that is free
    command = [sys.executable, "-m", "torch.distributed.run", *port, *shlex.split(line)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    name, caption, counts = done.stdout.splitlines()
    assert name == "clip.mp4" and judge(caption, scene)[2] and counts.count("tau") == 1


def write_clips(folder, count):
    folder.mkdir()
    for index, scene in enumerate(scenes("calibration", count)):
        write_clip(scene, folder / f"{index}.mp4")


def test_ones_own_pair_in_the_shell(tmp_path):
    """A profile that is certified, a table in which it stands, and a page."""
    write_clips(tmp_path / "clips", 8)
    _, table, _, captions = run_in_shell("README.md", tmp_path)
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["fidelity"]["certified"] and profile["config"]["gamma"] == 12
    assert "8 samples, 8 methods" in table
    rows = json.loads((tmp_path / "evaluation" / "summary.json").read_text())["rows"]
    tau = {row["method"]: row["tau"] for row in rows}
    assert tau["autoregression"] == 1 < tau["strict"] < tau["lvspec"]
    page = (tmp_path / "page.html").read_text()
    assert "lvspec report" in page and len(page) < 2**20
    assert captions.startswith("8 captions | 0 failed | 0 were there | 0 left | ")


def test_an_evaluation_goes_on_in_the_shell(tmp_path):
    """The second evaluation has nothing left to caption."""
    write_clips(tmp_path / "clips", 3)
    tables = run_in_shell("lvspec/evaluation/README.md", tmp_path)
    lines = (tmp_path / "evaluation" / "records.jsonl").read_text().splitlines()
    assert tables[0] == tables[1] and "3 samples, 8 methods" in tables[0]
    assert len(lines) == 1 + 3 * 8


def test_many_captions_in_the_shell(tmp_path):
    """The counts that the README shows, and one part of two."""
    write_clips(tmp_path / "clips", 8)
    name = "lvspec/captioning/README.md"
    first, table, part = run_in_shell(name, tmp_path)
    assert first.startswith("8 captions | 0 failed | 0 were there | 0 left | ")
    shown = re.search(r"```\n(shard .*?)```", READMES[name], re.DOTALL)[1]
    kinds = [re.sub(r"[\d.]+|[\w-]+-bound.*| +", " ", text).split() for text in (shown, table)]
    assert kinds[0] == kinds[1] and table.splitlines()[-1] == shown.splitlines()[-1]
    rows = (tmp_path / "others" / "captions-2-of-2.jsonl").read_text().splitlines()
    assert part.startswith(f"{len(rows)} captions | 0 failed") and 0 < len(rows) < 8


def test_an_engine_of_ones_own(printed):
    """A paged cache gives what a contiguous one gives."""
    lines = printed("ops.verify_attention")
    assert len(lines) == 4
    assert taus(lines[:2], "strict, [a-z]+: ")[0] > 1
    for contiguous, paged in (lines[:2], lines[2:]):
        assert paged == contiguous.replace("contiguous", "paged")
