"""A launch compiled without a GPU: what came out, and a key of everything that decides it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

Launch = tuple[Any, dict[str, Any]]  # a kernel and what it is launched with

Figures = dict[str, int]


_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Compilation:
    """A launch on a chip of compute capability `capability` (90: sm_90), to be compiled."""

    def __init__(self, launch: Launch, capability: int) -> None:
        kernel, given = launch
        arguments = dict(given)
        self._options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = arguments[parameter.name]
            specialized = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (specialized and _is_one(value)):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            signature[parameter.name] = _type_name(value)
            aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
            if aligned and specialized:
                attributes[(index,)] = [["tt.divisibility", 16]]
        self.kernel = kernel
        self._source = ASTSource(kernel, signature, constants, attributes)
        self._target = GPUTarget("cuda", capability, 32)

    def key(self) -> str:
        """A hash of all that the figures depend on: the text of the kernel and of what it calls,
        its constants, types and options, the chip, triton, ptxas, and this file.
        """
        _forget_line_numbers(self.kernel)
        backend = make_backend(self._target)
        parts = (
            triton.__version__,
            sorted(get_cache_invalidating_env_vars().items()),
            self._source.hash(),
            backend.hash(),
            backend.parse_options(dict(self._options)).hash(),
            Path(__file__).read_text(),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def figures(self) -> Figures:
        """Compile it and count."""
        compiled = triton.compile(self._source, target=self._target, options=dict(self._options))
        ptx = compiled.asm["ptx"]
        registers, stack = _resources(compiled.asm["cubin"])
        return {
            **{name: self._options[name] for name in ("num_warps", "num_stages")},
            "registers": registers,
            "spilled": stack,
            "shared": compiled.metadata.shared,
            "mma.sync": ptx.count("mma.sync"),
            "wgmma": ptx.count("wgmma.mma_async"),
            "tcgen05": ptx.count("tcgen05.mma"),
            "cp.async": len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
        }


def _forget_line_numbers(function: JITFunction) -> None:
    """In its module and those of what it calls: a line more above it is no change of a kernel."""
    for value in vars(sys.modules[function.__module__]).values():
        if isinstance(value, JITFunction) and value.starting_line_number:
            value.starting_line_number, value.hash = 0, None
            _forget_line_numbers(value)


def _is_one(value: Any) -> bool:
    return type(value) is int and value == 1


def _type_name(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPE_NAMES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


_TYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack a thread, which is where spilled ones go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {done.stdout}{done.stderr}")
    return int(found[1]), int(found[2])
