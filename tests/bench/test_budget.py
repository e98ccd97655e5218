"""bench/budget.py: what has changed is compiled again, and nothing else."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ROOT / "bench" / "budgets"


@pytest.fixture(scope="module")
def compiled_before(tmp_path_factory):
    """Triton's own cache, by which no test here can tell what budget.py asks for."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def budget(bench, monkeypatch, tmp_path, compiled_before):
    """The module with two calls on one chip, and tables in a folder of its own."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(compiled_before))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    module = bench("budget")
    calls = [call for call in module.CALLS if call[:2] in (SILU, NORM)]
    monkeypatch.setattr(module, "CALLS", calls)
    monkeypatch.setattr(module, "CHIPS", {"sm90": module.CHIPS["sm90"]})
    monkeypatch.setattr(module, "BUDGETS", tmp_path / "budgets")
    return module


SILU, NORM = ("silu_multiply", "bfloat16"), ("rms_norm", "bfloat16 H=896")


@pytest.fixture
def edit(monkeypatch, tmp_path):
    """`edit("silu_multiply", old, new)`: a file of kernels/ says this instead from now on."""

    def edited(name, old="", new=""):
        text = (ROOT / "kernels" / f"{name}.py").read_text()
        assert old in text
        path = tmp_path / f"{name}.py"
        path.write_text(text.replace(old, new, 1))
        spec = importlib.util.spec_from_file_location(f"lvspec.kernels.{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)

    return edited


def run(budget, capsys, *options):
    """(exit status, operations that were compiled, what was printed)"""
    compiled, whole = [], budget.compile_all

    def noted(rows, processes):
        compiled.extend(row.compilation.kernel.__name__.removesuffix("_kernel") for row in rows)
        return whole(rows, processes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "compile_all", noted)
        code = budget.main(["--processes", "1", *options])
    return code, compiled, capsys.readouterr().out


def test_compiles_what_the_table_does_not_have(budget, capsys):
    code, compiled, said = run(budget, capsys)
    assert (code, compiled) == (0, ["rms_norm", "silu_multiply"])
    assert "2 kernels, 2 compiled; there is no triton-" in said
    assert run(budget, capsys, "--update")[:2] == (0, ["rms_norm", "silu_multiply"])
    path, table = budget.committed()
    assert len(table) == 2 and all(row["registers"] > 0 for row in table.values())

    code, compiled, said = run(budget, capsys)
    assert (code, compiled) == (0, []) and "2 kernels, 0 compiled; compared with" in said
    assert run(budget, capsys, "--all")[:2] == (0, ["rms_norm", "silu_multiply"])
    before = path.read_text()
    assert run(budget, capsys, "--update")[:2] == (0, []) and path.read_text() == before


EDITS = {
    "text": ("silu_multiply", "1.0 + tl.exp(-wide)", "2.0 + tl.exp(-wide)"),
    "number of warps": ("silu_multiply", '"num_warps": 4', '"num_warps": 8'),
    "stages": ("silu_multiply", '"num_stages": 1', '"num_stages": 2'),
    "tile": ("silu_multiply", '"block": 1024', '"block": 2048'),
    "types": ("silu_multiply", "silu.to(tl.float32)", "silu.to(tl.float64)"),
    "specialisation": ("silu_multiply", "@triton.jit", '@triton.jit(do_not_specialize=["size"])'),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_compiles_its_kernel_again(budget, edit, capsys, kind):
    edit("silu_multiply")
    run(budget, capsys, "--update")
    edit(*EDITS[kind])
    assert run(budget, capsys)[1] == ["silu_multiply"]


def test_an_edit_of_what_kernels_call_compiles_them_all(budget, edit, capsys):
    run(budget, capsys, "--update")
    edit("rounding", "if ", "if not ")
    for caller in ("silu_multiply", "rms_norm"):
        edit(caller)
    assert run(budget, capsys)[1] == ["rms_norm", "silu_multiply"]


def test_a_line_above_compiles_nothing(budget, edit, capsys):
    run(budget, capsys, "--update")
    edit("silu_multiply", "import torch\n", "import math\n\nimport torch\n")
    assert run(budget, capsys)[1] == []


def test_what_became_worse_is_found_and_not_written(budget, edit, capsys):
    run(budget, capsys, "--update")
    path, table = budget.committed()
    edit("silu_multiply", '"num_warps": 4', '"num_warps": 1')  # four times the values in a thread
    code, compiled, said = run(budget, capsys)
    assert (code, compiled) == (1, ["silu_multiply"]) and "registers: " in said
    assert budget.committed()[1] == table
    assert run(budget, capsys, "--update")[:2] == (0, ["silu_multiply"])
    assert budget.committed()[1] != table
    assert run(budget, capsys)[:2] == (0, [])


def test_keys(budget):
    """By all that a figure depends on, and not by sizes that it does not depend on."""
    from lvspec.kernels import silu_multiply

    def key(capability=90, kernel=silu_multiply.silu_multiply_kernel, **changes):
        x = torch.empty(32, dtype=torch.bfloat16, device="meta")
        given = {"gate": x, "up": x, "y": x, "size": 32, "BLOCK": 1024}
        given |= {"gate_stride_row": 32, "up_stride_row": 32}
        given |= {"num_warps": 4, "num_stages": 1} | changes
        return budget.Compilation((kernel, given), capability).key()

    other = torch.empty(32, dtype=torch.float16, device="meta")
    keys = [key(), key(80), key(size=1), key(size=33), key(size=2**40), key(gate=other)]
    keys += [key(BLOCK=512), key(num_warps=8), key(num_stages=2)]
    assert len(set(keys)) == len(keys)
    assert key(size=64) == key() and key(y=torch.empty(9, 9, dtype=torch.bfloat16)) == key()


def test_a_row_without_a_key_is_compiled(budget, capsys):
    """Of a table that is older than keys; its figures count all the same."""
    run(budget, capsys, "--update")
    path, table = budget.committed()
    for row in table.values():
        del row["key"]
        row["registers"] -= 1
    budget.write(path, table)
    code, compiled, said = run(budget, capsys)
    assert (code, compiled) == (1, ["rms_norm", "silu_multiply"])
    assert said.count("registers: ") == 2


def test_key_of_another_triton(budget, monkeypatch):
    (row, *_) = budget.all_rows("silu")
    monkeypatch.setattr("triton.__version__", "3.6.99")
    assert budget.all_rows("silu")[0].key != row.key


def test_tables_are_whole():
    """One is of the triton that `constraints.txt` installs; each has a key in every row."""
    constraints = (ROOT / "constraints.txt").read_text()
    version = re.search(r"^triton==(\d+\.\d+)", constraints, re.MULTILINE)
    tables = {path.stem: json.loads(path.read_text()) for path in BUDGETS.glob("*.json")}
    assert f"triton-{version[1]}" in tables
    rows = [set(table) for table in tables.values()]
    assert all(names == rows[0] for names in rows)
    for table in tables.values():
        assert all(len(row["key"]) == 16 and row["spilled"] == 0 for row in table.values())
