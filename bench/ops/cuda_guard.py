"""Tensors without data "on CUDA" where torch was built without it."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
"""
"""Such a build refuses even fakes on CUDA, because nobody sets the current device."""


def build_guard(folder: Path) -> Path | None:
    """The library that makes torch accept the device, built in a folder; None: torch has CUDA.

    Raises:
        RuntimeError: There is no C++ compiler.
    """
    if torch.version.cuda:
        return None
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError(
            "a C++ compiler is needed to make torch accept a device that is not there"
        )
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(_SOURCE)
    root = Path(torch.__file__).parent
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    command = [compiler, *flags, str(source), "-lc10", "-o", str(library)]
    subprocess.run(command, check=True, timeout=120)
    return library


@functools.cache
def accept_cuda() -> None:
    """From now on this process makes tensors without data on CUDA.

    Raises:
        RuntimeError: There is no C++ compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = build_guard(Path(folder))
        if library is not None:
            ctypes.CDLL(str(library))
