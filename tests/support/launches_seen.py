"""What decides which kernels a launch compiles, of e2e.py's rows and of iterations without data.

    LVSPEC_BACKEND=triton TRITON_INTERPRET=1 python tests/support/launches_seen.py rows FILE
    python tests/support/launches_seen.py without-data FILE

The tiny pair on a CPU, as on a device but for the launches themselves, which are noted and not run.
FILE gets a list of (kernel, its arguments): flags as they are, of tensors the type, of integers
whether they are 1 or a multiple of 16.
"""

import importlib
import json
import pkgutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import torch

import lvspec.kernels

CONTEXT, ITERATIONS = 300, 1
SEEN: dict[str, None] = {}
LEFT_OUT = {"DOT_IN_FLOAT32"}  # of the interpreter alone


def note(kernel, grid, arguments):
    free = set(getattr(kernel, "do_not_specialize", None) or ())
    kinds = {
        name: "any" if name in free else kind_of(name, value)
        for name, value in arguments.items()
        if name not in LEFT_OUT
    }
    SEEN[json.dumps([kernel.__name__, kinds], sort_keys=True)] = None


def kind_of(name, value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    if type(value) is not int or name.isupper() or name in ("num_warps", "num_stages"):
        return "float" if type(value) is float else value
    return "one" if value == 1 else "sixteenth" if value % 16 == 0 else "other"


class Noted:
    """In the place of a kernel: its launches are noted."""

    def __init__(self, kernel):
        self._kernel = kernel

    def __getitem__(self, grid):
        return lambda **arguments: note(self._kernel, grid, arguments)


def rows():
    """e2e.py, whose operations leave zeros; what it then says of tokens is of no interest."""
    for found in pkgutil.walk_packages(lvspec.kernels.__path__, "lvspec.kernels."):
        importlib.import_module(found.name)
    for name, module in list(sys.modules.items()):
        if name.startswith("lvspec.kernels"):
            for kernel in [x for x in vars(module) if x.endswith("_kernel")]:
                value = getattr(module, kernel)
                setattr(module, kernel, value if isinstance(value, Noted) else Noted(value))
    import e2e
    from measuring import timing

    from lvspec.models import own_passes

    timing.copy_bandwidth = lambda device: 1e9
    timing.device_facts = lambda device: {"copy_gb_per_s": 1.0, "read_gb_per_s": 1.0}
    torch.empty, torch.allclose = torch.zeros, lambda *given, **options: True
    checked = own_passes.first_difference
    own_passes.first_difference = lambda *given: (checked(*given), None)[1]
    words = ["pairs", "--device", "cpu", "--dtype", "bfloat16", "--pair", "tiny", "--no-peers"]
    words += ["--context", str(CONTEXT), "--batch", "1", "--iterations", str(ITERATIONS)]
    sys.argv = ["e2e.py", *words]
    e2e.main()


def without_data():
    """What precompile.py compiles."""
    import precompile
    from pairs.pairs import PAIRS
    from pairs.row import WARM_UP

    tokens = (ITERATIONS + 2 * WARM_UP + 2) * 26
    precompile.compile_launch = note
    options = {"context": CONTEXT, "batch_size": 1, "gamma": 12, "max_new_tokens": tokens}
    precompile.compile_pair(PAIRS["tiny"], "sm90", **options)


if __name__ == "__main__":
    way, file = sys.argv[1:]
    {"rows": rows, "without-data": without_data}[way]()
    Path(file).write_text(json.dumps([json.loads(line) for line in SEEN]))
