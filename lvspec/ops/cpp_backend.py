"""The C++ operations: a library that registers itself for CPU tensors when it is loaded."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_C.abi3.so"


def why_missing() -> str | None:
    """Why there is no library to load, or None if there is one."""
    if LIBRARY.exists():
        return None
    return (
        "the C++ operations were not built: pip install --no-build-isolation lvspec, with torch "
        "and a C++17 compiler there, builds them (LVSPEC_REQUIRE_EXT=1 shows why it fails)"
    )


def load() -> str | None:
    """Load the library; returns what went wrong, or None."""
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} cannot be loaded: {error}"
    return None


def instruction_set() -> str:
    """Which of its kernels the loaded library runs: portable, avx2 or avx512.

    LVSPEC_CPU in the environment asks for a narrower one than the processor has.
    """
    function = ctypes.CDLL(str(LIBRARY)).lvspec_instruction_set
    function.restype = ctypes.c_char_p
    return function().decode()
