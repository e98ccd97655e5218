"""What the READMEs show is run as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Something that the examples of a README print.
PRINTED = {
    "README.md": ("tau", "HF's own tokens: True"),
    "lvspec/ops/README.md": ("strict, paged: tau ",),
}


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


def test_the_examples_are_found():
    assert PRINTED.keys() <= EXAMPLES.keys()
    assert len(EXAMPLES["README.md"]) > 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_python_examples_run(name, tmp_path):
    """One after the other in one process: each may use what those before it made."""
    examples = EXAMPLES[name]
    ends = [f"\nprint('end of example {index}')\n" for index in range(len(examples))]
    script = tmp_path / "examples.py"
    script.write_text("".join(map("".join, zip(examples, ends, strict=True))))
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    for printed in re.split(r"end of example \d+\n", done.stdout)[:-1]:
        assert printed.strip(), "every example shows what it does"
    for words in PRINTED.get(name, ()):
        assert words in done.stdout


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)#]+)", READMES[name]):
        if not re.match(r"\w+:", link):
            assert (ROOT / name).parent.joinpath(link).exists(), link
