"""The house: what a wheel contains, who may import whom, and that `kernels` stays HuggingFace's."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lvspec

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("lvspec", "kernels", "csrc", "bench", "tests")

# Imports point one way: a module imports from its own level or from one that stands before it here.
# `kernels` has no level: lvspec.ops alone imports it, and it imports nothing of lvspec.
LEVELS = [
    {"policy", "config", "cost", "tree", "trees", "stats", "reports", "video", "preprocess"}
    | {"environment", "vocabulary"},
    {"reference"},
    {"ops"},
    {"cache", "capture", "fused", "attention", "relevance", "families", "head", "models", "inputs"}
    | {"byte_linear", "fingerprint", "watch"},
    {"processing", "loading", "quantization"},
    {"processors", "sampling", "stopping", "state"},
    {"draft", "verify", "accept", "commit", "graph"},
    {"trace", "sequence", "iteration"},
    {"engine"},
    {"decoder"},
    {"generate", "hf"},
    {"calibrate", "report", "terminal", "shapes"},
    {"__init__"},
    {"commands"},
    {"cli", "__main__"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def copy_of_the_tree(folder):
    """The sources alone: no earlier build/ adds to a wheel made of them, none is left behind."""
    for room in ROOMS:
        if (ROOT / room).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / room, folder / room, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(source, out, **environment):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    return subprocess.run(
        [*pip, "-v", "-w", out, source],
        cwd=out,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = copy_of_the_tree(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("wheel")
    build = build_wheel(source, out)
    assert build.returncode == 0, build.stdout + build.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def wheel_text(wheel, name):
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")]
        return archive.read(member).decode()


def test_wheel_has_one_top_level_package(wheel_names):
    top = {name.split("/")[0] for name in wheel_names}
    version = importlib.metadata.version("lvspec")
    assert top == {"lvspec", f"lvspec-{version}.dist-info"}


def test_wheel_contains_every_module(wheel_names):
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lvspec").rglob("*.py")}
    modules |= {f"lvspec/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    assert "lvspec/kernels/__init__.py" in modules
    assert modules <= wheel_names, f"left out: {sorted(modules - wheel_names)}"


def test_wheel_contains_the_embedded_models(wheel_names):
    shapes = ROOT / "lvspec" / "shapes"
    files = [p for end in ("safetensors", "json", "md") for p in shapes.rglob(f"*.{end}")]
    data = {p.relative_to(ROOT).as_posix() for p in files}
    assert data <= wheel_names, f"left out: {sorted(data - wheel_names)}"
    if data:
        assert any(name.endswith(".safetensors") for name in data)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_wheel_contains_the_cpp_operations(wheel, wheel_names):
    """For any Python from 3.10 on, since nothing in them depends on its version."""
    assert "lvspec/_C.abi3.so" in wheel_names
    assert "-cp310-abi3-" in wheel.name


@pytest.mark.skipif(sys.platform != "linux", reason="names a compiler that fails")
def test_a_failing_compiler_leaves_the_cpp_operations_out(tmp_path):
    source, out = copy_of_the_tree(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    compilers = {"CC": "/bin/false", "CXX": "/bin/false"}
    build = build_wheel(source, out, **compilers)
    assert build.returncode == 0, build.stdout + build.stderr
    said = build.stdout + build.stderr
    assert "lvspec: installing without the C++ operations: " in said
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    required = build_wheel(source, out, **compilers, LVSPEC_REQUIRE_EXT="1")
    assert required.returncode != 0
    assert "LVSPEC_REQUIRE_EXT=1, but the C++ operations fail" in required.stdout + required.stderr


def test_without_torch_the_install_is_pure_python(tmp_path):
    """As under build isolation, where torch cannot be imported."""
    source, out = copy_of_the_tree(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    hidden = tmp_path / "hidden"
    (hidden / "torch").mkdir(parents=True)
    (hidden / "torch" / "__init__.py").write_text("raise ImportError('hidden')")
    build = build_wheel(source, out, PYTHONPATH=str(hidden))
    assert build.returncode == 0, build.stdout + build.stderr
    assert "torch cannot be imported here" in build.stdout + build.stderr
    (path,) = out.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")


def test_wheel_metadata(wheel):
    metadata = wheel_text(wheel, "METADATA")
    required = re.findall(r"^Requires-Dist: (.+)$", metadata, re.M)
    (triton,) = [line for line in required if line.startswith("triton")]
    assert "Linux" in triton and "x86_64" in triton and "aarch64" in triton
    (torch,) = [line for line in required if re.match(r"torch\b", line)]
    assert ">=" in torch and "==" not in torch, "torch is a range here; the Makefile pins it"
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.M))
    assert {"test", "flash-attn", "quant"} <= extras
    assert "lvspec = lvspec.cli:main" in wheel_text(wheel, "entry_points.txt")


def test_one_version(wheel):
    """setup.py says it; the wheel, the installed metadata and lvspec.__version__ repeat it."""
    written = re.findall(r'version="([^"]+)"', (ROOT / "setup.py").read_text())
    assert written == [importlib.metadata.version("lvspec")], "reinstall: pip install -e ."
    assert wheel.name.split("-")[1] == written[0]
    assert getattr(lvspec, "__version__", written[0]) == written[0]


# Where a top-level `kernels` would come from, and whether transformers takes it for HuggingFace's.
LOOK_FOR_KERNELS = """
import importlib.util
import lvspec.kernels
from transformers.utils import is_kernels_available
spec = importlib.util.find_spec("kernels")
print(lvspec.kernels.__file__, spec and spec.origin, is_kernels_available(), sep="\\n")
"""


def python(*arguments, cwd, path=()):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def look_for_kernels(tmp_path, cwd, path=()):
    script = tmp_path / "look.py"
    script.write_text(LOOK_FOR_KERNELS)
    result = python(script, cwd=cwd, path=path)
    assert result.returncode == 0, result.stderr
    ours, found, available = result.stdout.splitlines()[-3:]
    return Path(ours), found, available


def test_editable_install_maps_kernels_and_shadows_nothing(tmp_path):
    """A script run from the root, which is how the `lvspec` command runs there too."""
    ours, found, available = look_for_kernels(tmp_path, cwd=ROOT)
    assert ours.name == "__init__.py" and ours.parent.name == "kernels"
    assert found == "None" or not Path(found).is_relative_to(ROOT / "kernels")
    assert available == "False" or found != "None"


def test_wheel_maps_kernels_and_shadows_nothing(tmp_path, wheel):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    ours, found, available = look_for_kernels(tmp_path, cwd=tmp_path, path=[site])
    assert ours == site / "lvspec" / "kernels" / "__init__.py"
    assert found == "None" or not Path(found).is_relative_to(site)
    assert available == "False" or found != "None"


def test_pytest_shadows_nothing(request):
    assert request.config.getoption("importmode") == "importlib"
    assert not (ROOT / "conftest.py").exists() and not (ROOT / "tests" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not Path(spec.origin).is_relative_to(ROOT / "kernels"), (
        "the root is on sys.path: run `pytest`, not `python -m pytest`"
    )


def test_guard_names_the_cause():
    """`python -c` puts the root on sys.path; whoever finds our folder there is told so."""
    result = python("-c", "import kernels", cwd=ROOT)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: This folder is lvspec.kernels")
    assert "imported as 'kernels'" in message and "pip install -e ." in message


def imports_of(path, module, known):
    """The modules of lvspec that a file imports anywhere in it, named as in LEVELS."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            # `from lvspec import ops` may mean a module or a name in lvspec/__init__.py; what is
            # the name of a module counts as that module.
            targets = [f"{base}.{a.name}" if base == "lvspec" else base for a in node.names]
        else:
            continue
        for target in targets:
            parts = target.split(".")
            if parts[0] == "lvspec":
                found.add(parts[1] if len(parts) > 1 and parts[1] in known else "__init__")
    return found


def import_graph():
    files = {}
    for path in sorted((ROOT / "lvspec").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        files[path] = module
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        parts = ("lvspec", *path.relative_to(ROOT).with_suffix("").parts)
        files[path] = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    nodes = {module.split(".")[1] if "." in module else "__init__" for module in files.values()}
    graph = {node: set() for node in nodes}
    for path, module in files.items():
        node = module.split(".")[1] if "." in module else "__init__"
        graph[node] |= imports_of(path, module, nodes) - {node}
    return graph


def faults(graph):
    """What is wrong with an import graph {module: modules it imports}, one sentence each."""
    wrong = []
    for module, imported in sorted(graph.items()):
        if module != "kernels" and module not in LEVEL_OF:
            wrong.append(f"{module} has no place in LEVELS")
        for other in sorted(imported):
            if module == "kernels":
                wrong.append(f"kernels imports {other}")
            elif other == "kernels":
                if module != "ops":
                    wrong.append(f"{module} imports kernels, which is for ops alone")
            elif LEVEL_OF.get(other, 0) > LEVEL_OF.get(module, len(LEVELS)):
                wrong.append(f"{module} imports {other}, upward")
    remaining = {module: set(imported) for module, imported in graph.items()}
    while leaves := [m for m, imported in remaining.items() if not imported & remaining.keys()]:
        for leaf in leaves:
            del remaining[leaf]
    if remaining:
        wrong.append(f"a cycle among {', '.join(sorted(remaining))}")
    return wrong


def test_imports_point_one_way():
    assert faults(import_graph()) == []


@pytest.mark.parametrize(
    ("graph", "fault"),
    [
        ({"policy": {"ops"}, "ops": set()}, "policy imports ops, upward"),
        ({"cache": {"models"}, "models": {"cache"}}, "a cycle among cache, models"),
        ({"kernels": {"policy"}, "policy": set()}, "kernels imports policy"),
        ({"draft": {"kernels"}, "kernels": set()}, "draft imports kernels, which is for ops alone"),
        ({"generate": {"__init__"}, "__init__": set()}, "generate imports __init__, upward"),
        ({"elsewhere": set()}, "elsewhere has no place in LEVELS"),
    ],
)
def test_a_wrong_import_is_found(graph, fault):
    assert faults(graph) == [fault]


def test_every_form_of_import_is_read(tmp_path):
    path = tmp_path / "verify.py"
    path.write_text(
        "import lvspec.ops\nfrom lvspec import cache, Result\nfrom lvspec.tree import parents\n"
        "from . import config\nfrom .policy import strict\nimport torch\n"
        "def late():\n    from lvspec.kernels.accept import launch\n"
    )
    known = {"ops", "cache", "tree", "config", "policy", "kernels"}
    assert imports_of(path, "lvspec.verify", known) == known | {"__init__"}


def test_kernels_know_no_transformers():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "transformers"], path


# Folders of whoever wrote a file have no business in what others get. The pattern is in two pieces
# because this file is searched like every other.
MACHINE_PATHS = re.compile(r"(?<![\w.])/" r"(?:work|root|home|Users|tmp|farm|opt)/[\w.]")


@pytest.fixture(scope="module")
def tracked():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_tracked_file_is_large(tracked):
    large = {str(p): p.stat().st_size for p in tracked if p.stat().st_size > 30 * 2**20}
    assert not large


def test_no_tracked_file_names_a_path_of_one_machine(tracked):
    found = []
    for path in tracked:
        for match in MACHINE_PATHS.finditer(path.read_bytes().decode("latin-1")):
            found.append(f"{path.relative_to(ROOT)}: {match.group()}…")
    assert not found


@pytest.mark.parametrize("room", ["work", "root", "home"])
def test_a_path_of_one_machine_is_found(room):
    assert MACHINE_PATHS.search(f"see file:///{room}/x or '/{room}/me'")
    assert not MACHINE_PATHS.search(f"https://example.org/{room}/x and a/{room}/x")
