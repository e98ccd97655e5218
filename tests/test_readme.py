"""What the README shows is run as it stands there, and what it prints is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lvspec.shapes.captions import judge
from lvspec.shapes.scenes import scenes

README = Path(__file__).resolve().parent.parent / "README.md"
END = "end of example"
NUMBER = r"\d+\.\d\d"


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each example prints, by what is in it; one after the other in one process, as each may
    use what those before it made."""
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    folder = tmp_path_factory.mktemp("readme")
    script = folder / "examples.py"
    script.write_text("".join(f"{example}\nprint({END!r})\n" for example in examples))
    quiet = [f"-Werror::{kind}Warning" for kind in ("Future", "Deprecation")]
    done = subprocess.run(
        [sys.executable, *quiet, script], cwd=folder, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in re.split(r"[\r\n]", done.stderr) if "Loading weights" not in line]
    assert not "".join(said).strip(), "no warning and nothing else"
    outputs = done.stdout.split(f"{END}\n")[:-1]
    assert len(outputs) == len(examples)

    def find(*words):
        found = [
            output.splitlines()
            for example, output in zip(examples, outputs, strict=True)
            if all(word in example for word in words)
        ]
        assert len(found) == 1, f"{len(found)} examples have {words}"
        return found[0]

    find.all = outputs
    return find


def taus(lines, pattern=""):
    """Of lines that match, each with one."""
    found = [re.fullmatch(rf"{pattern}tau ({NUMBER}).*", line) for line in lines]
    assert all(found), lines
    return [float(match[1]) for match in found]


@pytest.mark.timeout(1000)
def test_every_example_shows_what_it_does(printed):
    assert len(printed.all) >= 8
    for output in printed.all:
        assert output.strip()
        assert "False" not in output and "nan" not in output


@pytest.mark.timeout(1000)
def test_a_caption(printed):
    caption, counts = printed("AcceptancePolicy.lvspec()", "print(result.text)")
    assert judge(caption, scenes("evaluation", 1)[0])[2], caption
    assert taus([counts])[0] > 8


@pytest.mark.timeout(1000)
def test_captions_of_several(printed):
    lines = printed("generate_many(\n", "result.index")
    assert min(taus(lines, r"\d ")) > 8
    for index, line in enumerate(lines):
        assert re.fullmatch(rf"{index} tau {NUMBER} (the|this) [a-z. ]+", line)
    assert len(lines) == 6
    lines = printed("lvspec.Decoder(")
    assert min(taus(lines)) > 8 and len(lines) == 3
    assert all(re.fullmatch(rf"tau {NUMBER} (graph|eager: .+)", line) for line in lines)


@pytest.mark.timeout(1000)
def test_ways_to_draft(printed):
    """That each says the target's tokens is asserted in the examples."""
    lines = printed("ways = {")
    assert len(lines) == 11
    assert min(taus(lines, r"[^:]+: ")) > 1
    lines = printed("draft_vocab=")
    assert len(lines) == 2 and min(taus(lines, r"\d+ tokens, gamma \d+: ")) > 2


@pytest.mark.timeout(1000)
def test_a_sample_that_stops(printed):
    caption, counts = printed("stop_strings=")
    assert taus([counts])[0] > 1
    assert " background" not in caption[: -len(" background")]


@pytest.mark.timeout(1000)
def test_inside_hf(printed):
    assert printed("custom_generate=") == ["HF's own tokens: True"]


@pytest.mark.timeout(1000)
def test_an_engine_of_ones_own(printed):
    """A paged cache gives what a contiguous one gives."""
    lines = printed("ops.verify_attention")
    assert len(lines) == 4
    assert taus(lines[:2], "strict, [a-z]+: ")[0] > 1
    for contiguous, paged in (lines[:2], lines[2:]):
        assert paged == contiguous.replace("contiguous", "paged")
