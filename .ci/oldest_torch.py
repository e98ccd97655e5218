"""csrc/binding*.cpp on the oldest torch of setup.py: it compiles, and what it calls exists there.

Headers are the same on every platform, so the wheel for macOS serves: some 80 MB where the one for
Linux brings gigabytes of CUDA. Its headers and its library are kept in build/, some 270 MB.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "torch/lib/libtorch_cpu.dylib"


def oldest() -> tuple[str, str]:
    """(version of torch, the flag that asks its headers for that version), as setup.py has them."""
    setup = (ROOT / "setup.py").read_text()
    (version,) = re.findall(r'"torch>=(\d+\.\d+)', setup)
    (flag,) = re.findall(r"-DTORCH_TARGET_VERSION=0x[0-9a-f]{16}", setup)
    major, minor = map(int, version.split("."))
    if not flag.endswith(f"0x{major:02x}{minor:02x}{0:012x}"):
        raise SystemExit(f"setup.py: expected a target version of torch {version}, got {flag}")
    return f"{version}.0", flag


def unpacked(version: str) -> Path:
    """The folder with `torch/include` and LIBRARY of a version, downloaded once."""
    place = ROOT / "build" / f"torch-{version}"
    if not place.exists():
        download = place.with_suffix(".part")
        shutil.rmtree(download, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download]
        wheels = ["--only-binary=:all:", "--python-version=3.11", "--platform=macosx_14_0_arm64"]
        subprocess.run([*pip, *wheels, f"torch=={version}"], check=True)
        (wheel,) = download.glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            wanted = [name for name in names if name.startswith("torch/include/")] + [LIBRARY]
            archive.extractall(download, wanted)
        wheel.unlink()
        download.rename(place)
    return place


def missing(needed: str, library: bytes) -> list[str]:
    """Names of torch's interface in the output of nm that no symbol of the library has."""
    names = re.findall(r"\bU ((?:aoti_)?torch_\w+)$", needed, re.MULTILINE)
    if not names:
        raise SystemExit("expected calls of torch in binding.o, got none")
    return [name for name in names if b"\0_" + name.encode() + b"\0" not in library]


def main() -> int:
    version, flag = oldest()
    place = unpacked(version)
    headers = [f"-I{ROOT / 'csrc'}", f"-isystem{place / 'torch' / 'include'}"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wno-psabi", flag, *headers]
    compiler = shutil.which("g++") or "c++"
    library = (place / LIBRARY).read_bytes()
    absent = set()
    for source in sorted((ROOT / "csrc").glob("binding*.cpp")):
        binary = place / f"{source.stem}.o"
        subprocess.run([compiler, *flags, "-c", source, "-o", binary], check=True)
        symbols = subprocess.run(["nm", "-u", binary], check=True, capture_output=True, text=True)
        absent.update(missing(symbols.stdout, library))
    names = ", ".join(sorted(absent)) or "nothing"
    print(f"torch {version}: csrc/binding*.cpp compile; missing: {names}")
    return 1 if absent else 0


if __name__ == "__main__":
    sys.exit(main())
