"""An iteration on CUDA tensors without values, in a process of its own (`support/fake_cuda.py`)."""

from pathlib import Path

import pytest
from ways import WAYS

SCRIPT = Path(__file__).parents[1] / "support" / "fake_cuda.py"


@pytest.mark.slow
def test_every_way_of_drafting(fake_cuda, random_pair_folders):
    done = fake_cuda("all", *random_pair_folders)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(WAYS), "of every way two batches"
    # Six columns, and of 26 slots tokens, regrets and anchors.
    assert "static tree, batch 2: (2, 85)" in lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("state.num_out.item()", "_local_scalar_dense"),
        ("state.out_ids[state.out_ids > 0]", "nonzero"),
        ("torch.zeros(3).to(state.num_out.device)", "a tensor on cpu"),
    ],
)
def test_what_would_stop_a_device_is_seen(
    fake_cuda, random_pair_folders, tmp_path, change, message
):
    """The same script with an iteration that does it."""
    changed = tmp_path / "changed.py"
    plain = "    kind, options = WAYS[way]\n"
    code = SCRIPT.read_text()
    assert code.count(plain) == 1
    patch = """    from lvspec.phases.iteration import Iteration
    plain = Iteration.accept
    Iteration.accept = lambda self, *given: (plain(self, *given), _change(self.state))[0]
    kind, options = WAYS[way]
"""
    code = code.replace(plain, patch).replace(
        "def main(",
        f"def _change(state):\n    {change}\n\n\ndef main(",
    )
    changed.write_text(code)
    done = fake_cuda("chain", *random_pair_folders, script=changed)
    assert done.returncode != 0
    assert message in done.stderr
