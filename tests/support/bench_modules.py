"""Modules of bench/, for a while."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parents[2] / "bench")


@contextmanager
def modules_of_bench():
    """A function that imports them by name; in the end none of them is left."""
    before = set(sys.modules)
    sys.path.insert(0, FOLDER)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(FOLDER)
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            # A folder is a package without a file, and would hand on the modules it had before.
            places = (getattr(module, "__file__", None) or "", *getattr(module, "__path__", ()))
            if any(place.startswith(FOLDER) for place in places):
                del sys.modules[name]
