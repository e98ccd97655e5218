"""Triton's own just-in-time compiler, launchers included, with a driver that has no device."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build, driver


@dataclass
class Compiled:
    """What went through the compiler, and what of it was not in the cache.

    Attributes:
        kernels: Names and hashes of kernels.
        compiled: Names of those that were compiled.
        built: Names of modules in C (launchers, the driver's) that were built.
    """

    kernels: set[tuple[str, str]] = field(default_factory=set)
    compiled: list[str] = field(default_factory=list)
    built: list[str] = field(default_factory=list)


class _NoDriver:
    """What Triton asks a driver when it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher

    def get_current_device(self) -> int:
        return self._target.arch  # one cache in the process for every chip

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class _Pointer:
    """A tensor as a launch looks at it: its type, and where it begins within 16 bytes.

    Memory that torch allocates begins at a multiple of them.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._begin = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return 2**20 + self._begin


def compile_launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Compile a launch, and what launches it, as Triton does before it would be launched."""
    given = {
        name: _Pointer(value) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    compiled = kernel.run(grid=grid, warmup=True, **given)
    driver.active.launcher_cls(compiled.src, compiled.metadata)


@contextlib.contextmanager
def compiling_for(capability: int, cache: Path) -> Iterator[Compiled]:
    """Within this context Triton compiles for a chip (90: sm_90) that is not here, into a folder.

    Raises:
        RuntimeError: There is no C compiler.
    """
    found = Compiled()
    builds, before = build._build, (driver._active, knobs.compilation.listener)

    def noted_build(name: str, *arguments: Any, **options: Any) -> str:
        found.built.append(name)
        return builds(name, *arguments, **options)

    def noted(*, src: Any, metadata: dict[str, Any], cache_hit: bool, **rest: Any) -> None:
        found.kernels.add((metadata["name"], metadata["hash"]))
        if not cache_hit:
            found.compiled.append(metadata["name"])

    stub = _stub()
    flags = sys.getdlopenflags()
    # What was built in C is loaded, too; its symbols are looked up when they are called.
    sys.setdlopenflags(os.RTLD_LAZY)
    variables = {"TRITON_CACHE_DIR": str(cache), "LIBRARY_PATH": stub}
    kept = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    build._build, knobs.compilation.listener = noted_build, noted
    try:
        driver.set_active(_NoDriver(capability))
        yield found
    finally:
        sys.setdlopenflags(flags)
        build._build = builds
        driver._active, knobs.compilation.listener = before
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


LIBCUDA = "/lib/x86_64-linux-gnu"
"""Where libcuda is on most machines that have one: from triton 3.7 on it is part of a key."""


@functools.cache
def _stub() -> str:
    """The folder of an empty library in place of libcuda, which what is built in C names."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("a C compiler is needed to build Triton's launchers")
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = Path(folder, "libcuda.so.1")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "/dev/null"]
    subprocess.run([*command, "-o", str(library)], check=True)
    knobs.nvidia.libcuda_path = LIBCUDA
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return folder
