"""What others install: the sdist, the wheel built of it, and that wheel in a venv of its own."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lvspec

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (".ci", "lvspec", "kernels", "csrc", "bench", "tests")
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.so")


def copy_of_the_tree(folder):
    """The sources alone: no earlier build/ adds to a wheel made of them, none is left behind."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=NOT_SOURCES)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    return folder


def build_wheel(source, out, **environment):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    return run(*pip, "-v", "-w", out, source, cwd=out, **environment)


def run(*command, cwd, **environment):
    env = {**os.environ, **environment}
    command = list(map(str, command))
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The folder that an sdist unpacks to."""
    source = copy_of_the_tree(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("sdist")
    script = f"import setuptools.build_meta as build; build.build_sdist({str(out)!r})"
    # -I: the root of the sources has a `kernels` that torch must not find
    build = run(sys.executable, "-I", "-c", script, cwd=source)
    assert build.returncode == 0, build.stdout + build.stderr
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        members.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    build = build_wheel(sdist, out)
    assert build.returncode == 0, build.stdout + build.stderr
    (path,) = out.glob("*.whl")
    return path


def test_sdist_is_the_checkout(sdist):
    """Headers, benchmarks, tests and the constraints too: `make test` works in it."""
    tree = copy_of_the_tree(sdist.parent / "tree")
    expected = {path.relative_to(tree) for path in tree.rglob("*") if path.is_file()}
    for name in ("csrc/kernels.h", "constraints.txt", "tests/conftest.py", ".ci/run"):
        assert Path(name) in expected
    found = {path.relative_to(sdist) for path in sdist.rglob("*") if path.is_file()}
    assert expected <= found, f"left out: {sorted(map(str, expected - found))}"


@pytest.fixture(scope="module")
def wheel_names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def wheel_text(wheel, name):
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")]
        return archive.read(member).decode()


def test_an_index_has_the_front_page_without_links_to_files(wheel):
    text = wheel_text(wheel, "METADATA")
    assert "## Your pair on your GPU" in text and "Using lvspec (lvspec/README.md)" in text
    assert not re.findall(r"\]\((?!\w+:)", text)


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
    files = [p for p in shapes.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    data = {p.relative_to(ROOT).as_posix() for p in files}
    assert {"model.safetensors", "chat_template.jinja"} <= {p.name for p in files}
    assert data <= wheel_names, f"left out: {sorted(data - wheel_names)}"


def test_wheel_contains_what_pages_are_drawn_with(wheel_names):
    files = (ROOT / "lvspec" / "reporting" / "templates").iterdir()
    templates = {path.relative_to(ROOT).as_posix() for path in files}
    assert "lvspec/reporting/templates/page.css" in templates
    assert templates <= wheel_names, f"left out: {sorted(templates - wheel_names)}"


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
    assert lvspec.__version__ == written[0]


@pytest.fixture(scope="module")
def venv(wheel, tmp_path_factory):
    """`venv("lvspec", "info")`: (an empty folder, what the command of a venv prints there).

    What lvspec needs is that of the running interpreter, lvspec itself excepted: paths in a .pth
    file are read, but an editable install among them is not.
    """
    root = tmp_path_factory.mktemp("venv")
    made = run(sys.executable, "-m", "venv", "--without-pip", root, cwd=root)
    assert made.returncode == 0, made.stderr
    (packages,) = root.glob("lib/python*/site-packages")
    elsewhere = [path for path in sys.path if any(Path(path).glob("*.dist-info"))]
    (packages / "elsewhere.pth").write_text("\n".join(elsewhere) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", root / "bin" / "python", "install"]
    options = ["--no-deps", "--no-index", "--force-reinstall"]
    done = run(*pip, *options, wheel, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    outside = tmp_path_factory.mktemp("outside")

    def run_there(command, *arguments):
        variables = {"PYTHONPATH": "", "LVSPEC_BACKEND": "", "TRITON_INTERPRET": "0"}
        done = run(root / "bin" / command, *arguments, cwd=outside, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return outside, done.stdout

    _, found = run_there("python", "-c", "import lvspec; print(lvspec.__file__, end='')")
    assert Path(found).is_relative_to(root)
    return run_there


def test_an_installed_wheel_runs_the_demo(venv):
    words = ("--clips", "1", "--gamma", "12")  # lengths that the clock chooses are not compared
    outside, _ = venv("lvspec", "demo", *words, "--json", "rows.json")
    document = json.loads((outside / "rows.json").read_text())
    rows = {row["method"]: row for row in document["rows"]}
    assert {"autoregression", "hf generate", "strict", "lvspec"} <= rows.keys()
    assert all(row["captions"] == 1 for row in rows.values())
    assert rows["lvspec"]["tau"] > rows["strict"]["tau"] > 1


def test_an_installed_wheel_runs_the_first_example_and_captions_its_clip(venv):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    _, printed = venv("python", "-c", example)
    text, *_, stats = printed.splitlines()
    assert stats.startswith("tau ")
    words = ("--video", "clip.mp4", "--prompt", "describe the video.", "--json", "/dev/stdout")
    # A loose caption depends on gamma, and the shell's default is chosen by the clock.
    gamma = re.search(r"gamma=(\d+)", example)[1]
    _, printed = venv("lvspec", "generate", *words, "--gamma", gamma)
    assert text in printed


def test_an_installed_wheel_says_what_it_is(venv, wheel):
    _, printed = venv("lvspec", "info", "--json")
    facts = json.loads(printed)
    version = wheel.name.split("-")[1]
    assert facts["versions"]["lvspec"] == lvspec.__version__ == version
    assert facts["versions"]["commit"] is None
    if shutil.which("g++"):
        assert facts["backends"]["cpp"].startswith("yes")
