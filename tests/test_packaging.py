"""The house: who may import whom, that `kernels` stays HuggingFace's, and what files hold."""

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

ROOT = Path(__file__).resolve().parents[1]

# Imports point one way: a module imports from its own level or from one that stands before it here.
# `kernels` has no level: lvspec.ops alone imports it, and it imports nothing of lvspec.
LEVELS = [
    {"policy", "config", "cost", "tree", "trees", "stats", "reports", "checkpoint"},
    {"video", "environment", "vocabulary", "hf_names", "warmup"},
    {"reference"},
    {"ops"},
    {
        "fingerprint",
        "watch",
        "cache",
        "capture",
        "fused",
        "attention",
        "relevance",
        "families",
        "head",
        "models",
        "inputs",
    }
    | {"byte_linear"},
    {"loading", "quantization"},
    {"defaults", "keywords", "processors", "sampling", "stopping", "state"},
    {"draft", "verify", "accept", "commit", "graph", "gate"},
    {"trace", "sequence", "iteration", "streams"},
    {"engine"},
    {"decoder"},
    {"generate", "hf"},
    {"calibrate", "report", "terminal", "shapes"},
    {"__init__"},
    {"commands"},
    {"cli", "__main__"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def test_sources_on_a_path_have_a_version_too():
    """Without site-packages there is no metadata to ask: `lvspec --version` and imports go on."""
    script = (
        f"import sys; sys.path[:] = [{str(ROOT)!r}, *filter(None, sys.path)]\n"
        "import lvspec\nfrom lvspec.cli import main\nprint(lvspec.__version__)\n"
        "main(['--version'])\n"
    )
    command = [sys.executable, "-I", "-S", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["0+unknown", "lvspec 0+unknown"], done.stderr


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
