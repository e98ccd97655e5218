"""What a result was made with, and result files that are whole or not there."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any


def environment(device: Any = "cpu") -> dict[str, Any]:
    """Versions and the machine, as plain values to stand beside measured figures.

    Args:
        device: Where the run takes place, a `torch.device` or its name.

    Returns:
        Versions of lvspec, python, torch, transformers and triton (None where it is absent), the
        commit of a checkout (None for an installed wheel), the platform, the processor, the device
        with its name, and torch's threads.
    """
    import torch

    device = torch.device(device)
    on_cuda = device.type == "cuda"
    return {
        "lvspec": version("lvspec"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "triton": version("triton"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def version(package: str) -> str | None:
    """What is installed of a package, or None: of `lvspec` itself, in sources on a path alone."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def number_on_machine(argument: str) -> int:
    """Which of the processes that torchrun has started on this machine this one is, from 0.

    Args:
        argument: What asks for several processes, for messages.

    Raises:
        ValueError: torchrun has not started this process.
    """
    missing = [name for name in _OF_TORCHRUN if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"{argument}: expected processes that torchrun has started (torchrun --nproc-per-node "
            f"N -m lvspec ...), got one without {', '.join(missing)} in its environment"
        )
    return int(os.environ["LOCAL_RANK"])


class NotWritten(OSError):
    """A file of results could not be written. Names it, and why."""


def check_json_path(path: str | os.PathLike) -> None:
    """Refuse, before any work is done, a path that `write_json` could not write.

    Raises:
        OSError: Its folder does not exist or cannot be written, or it is a folder itself.
    """
    file = _resolved(path)
    if file.is_dir():
        raise IsADirectoryError(f"--json: expected the name of a file, got the folder {path}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"--json: expected a name in an existing folder, got {path}")
    if not os.access(file if _is_special(file) else file.parent, os.W_OK):
        raise PermissionError(f"--json: expected a folder that can be written, got that of {path}")


def write_json(path: str | os.PathLike, value: Any, *, name: str = "--json") -> None:
    """Write `value` as JSON; the file appears, or is replaced, only when it is complete.

    JSON has no NaN and no infinity: these become null.

    Args:
        path: Where to write; its folder must exist.
        value: Mappings, sequences, strings, numbers, booleans, None, paths.
        name: What errors are about.

    Raises:
        NotWritten: It cannot be written.
        TypeError: A value has no form in JSON.
    """
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Bytes of a file name that are not UTF-8 are lone surrogates in Python. JSON spells these as
    # Python's escapes do, and whoever reads the file has the same name again.
    content = text.encode("utf-8", "backslashreplace")
    try:
        _replace(_resolved(path), content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise NotWritten(
            f"{name}: expected a file that can be written, got {path}: {reason}"
        ) from error


def _replace(file: Path, content: bytes) -> None:
    if _is_special(file):  # a pipe or a device: replacing it would remove it
        file.write_bytes(content)
        return
    partial = file.with_name(f".{uuid.uuid4().hex}.part")
    try:
        partial.write_bytes(content)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _resolved(path: str | os.PathLike) -> Path:
    """Where a link leads, so that the file is replaced and not the link.

    What stdout leads to, as /dev/stdout, may have no name; then the link is all there is.
    """
    return Path(path) if _is_special(Path(path)) else Path(os.path.realpath(path))


def _is_special(file: Path) -> bool:
    return file.exists() and not file.is_file()


def plain(value: Any) -> Any:
    """As JSON has it: lists, strings for keys and paths, and None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    # Without this, an install inside somebody else's repository would report their commit.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def made_folder(out: str | os.PathLike) -> Path:
    """The folder `out`, made where it is not there yet.

    Raises:
        OSError: It is a file, or cannot be made; the message names it.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = "a file" if Path(out).is_file() else error.strerror
        raise type(error)(f"out: expected a folder, got {os.fspath(out)}: {got}") from error
    return Path(out)
