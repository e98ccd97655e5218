"""The house: who may import whom, that `kernels` stays HuggingFace's, and what files hold."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lvspec import environment

ROOT = Path(__file__).resolve().parents[1]

# Imports point down this list: a package (or one of the few files beside them) imports from a floor
# below its own, where `kernels` has none: lvspec.ops alone imports it, and it imports `rule` alone,
# the names of a policy's numbers. What is not named here has no place in lvspec/.
FLOORS = [
    {"checkpoint", "checks", "environment", "rule", "tree", "warmup"},
    {"profile"},
    {"policy", "tree_shapes", "video"},
    {"config", "reference"},
    {"ops"},
    {"models"},
    {"phases"},
    {"engine"},
    {"evaluation"},
    {"captioning"},
    {"ray"},
    {"shapes"},
    {"calibration"},
    {"reporting"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


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


@pytest.mark.parametrize("room", ["lvspec", "kernels", "bench"])
def test_a_file_is_a_screen_or_eight(room):
    """Nobody holds more than that in mind."""
    counts = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for path in (ROOT / room).rglob("*.py")
    }
    assert counts and {name: count for name, count in counts.items() if count > 400} == {}


def pinned():
    """Of every package in constraints.txt the versions, of which one is for this Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found: dict[str, list[Requirement]] = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        requirement = Requirement(line)
        assert [part.operator for part in requirement.specifier] == ["=="], line
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def version_of(requirement):
    (part,) = requirement.specifier
    return part.version


def test_what_make_installs_is_named_and_allowed():
    """Whatever lvspec needs, directly or not, has one exact version on each Python."""
    constraints, seen, wanted = pinned(), set(), ["lvspec"]
    for requirements in constraints.values():
        for minor in range(10, 15):
            here = {"python_version": f"3.{minor}"}
            assert sum(r.marker is None or r.marker.evaluate(here) for r in requirements) <= 1
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        # What another version needs is no matter of these constraints.
        if name != "lvspec" and environment.version(name) not in map(version_of, constraints[name]):
            continue
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            extra = {"extra": "test" if name == "lvspec" else ""}
            other = canonicalize_name(requirement.name)
            # Of torch's own wheels some bring CUDA, by exact versions.
            if re.match("nvidia-|cuda-", other):
                continue
            if requirement.marker is None or requirement.marker.evaluate(extra):
                assert other in constraints, f"{name} needs {line}, which constraints.txt lacks"
                if name == "lvspec":
                    for one in constraints[other]:
                        assert requirement.specifier.contains(version_of(one)), (line, str(one))
                wanted.append(other)


def test_the_oldest_are_those_of_setup():
    (line,) = re.findall(r"^OLD +:= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    setup = (ROOT / "setup.py").read_text()
    for name in ("transformers", "av"):
        (bound,) = re.findall(rf'"{name}>=([\d.]+)', setup)
        (oldest,) = re.findall(rf"\b{name}==([\d.]+)", line)
        assert (oldest + ".").startswith(bound + "."), (name, oldest, bound)


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
    """The modules of lvspec that a file imports anywhere in it, named as in FLOORS."""
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


def files_of_lvspec():
    """{path: its module}."""
    files = {}
    for path in sorted((ROOT / "lvspec").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        files[path] = module
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        parts = ("lvspec", *path.relative_to(ROOT).with_suffix("").parts)
        files[path] = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return files


def import_graph():
    """{package or file beside them: those it imports}."""
    files = files_of_lvspec()
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
        if module != "kernels" and module not in FLOOR_OF:
            wrong.append(f"{module} has no place in FLOORS")
        for other in sorted(imported):
            if module == "kernels":
                if other != "rule":
                    wrong.append(f"kernels imports {other}, which is not rule")
            elif other == "kernels":
                if module != "ops":
                    wrong.append(f"{module} imports kernels, which is for ops alone")
            elif FLOOR_OF.get(other, 0) >= FLOOR_OF.get(module, len(FLOORS)):
                wrong.append(f"{module} imports {other}, which is no floor below")
    return wrong


def in_circles(graph):
    """The files of {file: files it imports} that import each other around a corner."""
    remaining = {module: set(imported) for module, imported in graph.items()}
    while leaves := [m for m, imported in remaining.items() if not imported & remaining.keys()]:
        for leaf in leaves:
            del remaining[leaf]
    return sorted(remaining)


def file_graph():
    """{file: the files it imports}, for lvspec/ and kernels/; a package is its __init__."""
    files = files_of_lvspec()
    known = set(files.values())
    graph = {}
    for path, module in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (names & known) or {node.module}
        graph[module] = found & known - {module}
    return graph


def test_imports_point_one_way():
    assert faults(import_graph()) == []


def test_no_files_import_each_other_around_a_corner():
    assert in_circles({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]
    assert in_circles(file_graph()) == []


@pytest.mark.parametrize(
    ("graph", "fault"),
    [
        ({"policy": {"ops"}, "ops": set()}, "policy imports ops, which is no floor below"),
        ({"policy": {"video"}, "video": set()}, "policy imports video, which is no floor below"),
        ({"kernels": {"policy"}, "policy": set()}, "kernels imports policy, which is not rule"),
        (
            {"models": {"kernels"}, "kernels": set()},
            "models imports kernels, which is for ops alone",
        ),
        (
            {"engine": {"__init__"}, "__init__": set()},
            "engine imports __init__, which is no floor below",
        ),
        ({"elsewhere": set()}, "elsewhere has no place in FLOORS"),
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
