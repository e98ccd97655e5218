"""What every microbenchmark gets: a device, its cases, and a way to measure and report one.

pytest bench/ops/bench_*.py                       small cases on the CPU, the usual ones on a GPU
pytest bench/ops/bench_accept.py --full           every combination of sizes
pytest bench/ops/bench_*.py --benchmark-json=FILE then `python bench/report.py FILE`
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

# pytest's importlib mode puts nothing on the path; what is beside this file is for these files.
sys.path.insert(0, str(Path(__file__).parent))

from measuring import timing
from ops.cases import Case, cases
from ops.linear_cases import LinearCase, linear_cases
from ops.peers import COMPILED_PEERS, Peer
from ops.reasons import DoesNotFit, Unavailable

from lvspec import ops
from lvspec.environment import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lvspec benchmarks")
    group.addoption("--full", action="store_true", help="every combination of sizes (CUDA)")
    group.addoption("--bench-device", help="default: cuda where there is one, else cpu")
    group.addoption("--max-piece", type=int, help="of verify_attention's plans")
    group.addoption("--no-peers", action="store_true", help="measure lvspec's operations only")
    group.addoption("--compile", action="store_true", help="compiled peers too, a minute or two")


def _device(config: pytest.Config) -> torch.device:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(config.getoption("--bench-device") or default)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` runs through the sizes of the operation that the file is named after."""
    if "case" in metafunc.fixturenames:
        operation = metafunc.module.__name__.rpartition("bench_")[2]
        config = metafunc.config
        on_cuda = _device(config).type == "cuda"
        which = ("full" if config.getoption("--full") else "usual") if on_cuda else "small"
        is_linear = operation == "scaled_linear"
        chosen = linear_cases(which) if is_linear else cases(operation, which)
        metafunc.parametrize("case", chosen, ids=str)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    device = _device(config)
    machine_info.pop("node", None)
    machine_info["lvspec"] = {
        "environment": environment(device),
        "backend": ops.active_backend(device.type),
        "limits": timing.device_facts(device),
    }


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return _device(request.config)


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    """What models decode in: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(scope="session")
def max_piece(request: pytest.FixtureRequest) -> int | None:
    return request.config.getoption("--max-piece")


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def inputs_of(device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """`inputs_of(make, case)` is what `make(case, device, dtype)` returns, if that fits."""

    def make_inputs(make: Callable[..., Any], case: Case | LinearCase) -> Any:
        try:
            return make(case, device, dtype)
        except (DoesNotFit, torch.OutOfMemoryError) as error:
            pytest.skip(f"{case}: does not fit into the device's memory: {error}")

    return make_inputs


@pytest.fixture
def report(benchmark, request: pytest.FixtureRequest, device: torch.device, dtype: torch.dtype):
    """`report(case, call, num_bytes, peers, *arguments)`: measure, and add the figures.

    `call` has been checked by then. The peers are made of `(case, *arguments)` and measured in the
    same run; what one cannot do here stands in its place as a sentence.
    """

    def measure(
        case: Case | LinearCase,
        call: Callable[[], Any],
        num_bytes: int,
        peers: Mapping[str, Peer],
        *arguments: Any,
        **facts: Any,
    ) -> None:
        bandwidth = timing.copy_bandwidth(device)
        ours = timing.measure(call, device)
        info = benchmark.extra_info
        info |= {
            "operation": request.module.__name__.rpartition("bench_")[2],
            "case": str(case),
            "sizes": asdict(case),
            "dtype": str(dtype).removeprefix("torch."),
            "backend": ops.active_backend(device.type),
            **facts,
            "bytes": num_bytes,
            "limit_ms": 1e3 * num_bytes / bandwidth,
            "gb_per_s": num_bytes / ours.median_ms / 1e6,
            "share_of_copy": num_bytes / (ours.median_ms / 1e3) / bandwidth,
            "launch_ms": timing.launch_ms(device),
            **ours._asdict(),
        }
        if device.type == "cuda":
            info["calls_ms"] = timing.measure(call, device, how="calls").median_ms
        with_peers = {} if request.config.getoption("--no-peers") else peers
        compiles = request.config.getoption("--compile")
        info["peers"] = {
            name: _measured(peer, case, arguments, device)
            if compiles or peer not in COMPILED_PEERS
            else {"unavailable": "compiled: measured with --compile"}
            for name, peer in with_peers.items()
        }

        def once() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.pedantic(once, rounds=5, warmup_rounds=1)

    return measure


def _measured(
    peer: Peer, case: Case | LinearCase, arguments: tuple, device: torch.device
) -> dict[str, Any]:
    try:
        call = peer(case, *arguments)
        try:
            return timing.measure(call, device)._asdict()
        except RuntimeError:  # not capturable; out of memory fails once more
            return timing.measure(call, device, how="calls")._asdict()
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    except Exception as error:  # another project's failure is a fact about it, not the end
        return {"unavailable": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
