"""Modules of bench/, for a while."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parents[2] / "bench")
PACKAGES = {path.name for path in Path(FOLDER).iterdir() if path.is_dir()}


@contextmanager
def modules_of_bench():
    """A function that imports them by name: anew, and as they were for everyone else behind it."""
    kept = _take_out()
    sys.path.insert(0, FOLDER)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(FOLDER)
        _take_out()
        sys.modules.update(kept)


def _take_out():
    """Those that are imported, which they are no longer."""
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        # A folder is a package without a file, and would hand on the modules it had before.
        if name in PACKAGES if file is None else file.startswith(FOLDER):
            found[name] = sys.modules.pop(name)
    return found
