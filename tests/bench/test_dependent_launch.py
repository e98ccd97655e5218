"""Kernels that may be launched early, compiled for sm_90 without a GPU."""

import pytest

pytest.importorskip("triton")

SOME = (
    ("linear_add_", "bfloat16 N=2048", "few_rows_kernel"),
    ("rotate_and_write", "bfloat16 D=64", "rotate_and_write_kernel"),
    ("verify_attention", "bfloat16 D=64 rows=16", "merge_kernel"),
)


@pytest.fixture
def compiled(bench, monkeypatch, tmp_path):
    """`compiled(operation, label, kernel)`: PTX of one kernel of a call, and its launch."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    budget = bench("budget")
    import triton
    from triton.backends.compiler import GPUTarget

    def compiled(operation, label, kernel):
        call = next(x for x in budget.CALLS if x[0] == operation and x[1].startswith(label))
        arguments, capability = call[2]("sm90")
        launches = budget.launches_of(operation, arguments, "sm90")
        launched = next(x for x in launches if x[0].__name__ == kernel)
        source = budget.Compilation(launched, capability)._source
        options = {name: launched[1][name] for name in ("num_warps", "num_stages", "launch_pdl")}
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options=options).asm["ptx"], launched[1]

    return compiled


@pytest.mark.parametrize(("operation", "label", "kernel"), SOME)
def test_kernels_wait_where_they_are_launched_early(
    operation, label, kernel, compiled, monkeypatch
):
    """All others know nothing of it."""
    from lvspec.kernels import launch

    text, launched = compiled(operation, label, kernel)
    assert "griddepcontrol" not in text and not launched["launch_pdl"]
    monkeypatch.setattr(launch, "DEPENDENT", True)
    text, launched = compiled(operation, label, kernel)
    assert launched["launch_pdl"]
    wait, rest = text.split("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in rest
    assert "ld.global" not in wait and "st.global" not in wait
    assert ("prefetch.global.L2" in wait) == (kernel == "few_rows_kernel")
