"""What the README shows is run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_python_examples_run(tmp_path):
    """One after the other in one process: each may use what those before it made."""
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(examples) > 2
    ends = [f"\nprint('end of example {index}')\n" for index in range(len(examples))]
    script = tmp_path / "examples.py"
    script.write_text("".join(map("".join, zip(examples, ends, strict=True))))
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    for printed in re.split(r"end of example \d+\n", done.stdout)[:-1]:
        assert printed.strip(), "every example shows what it does"
    assert "tau" in done.stdout
    assert "HF's own tokens: True" in done.stdout
