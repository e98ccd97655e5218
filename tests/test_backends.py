"""What is the same whoever computes: schemas, signatures, and the choice of a backend."""

import importlib
import inspect
import os
import subprocess
import sys

import pytest
import torch

from lvspec import ops, reference
from lvspec.ops import registry

NAMES = sorted(set(registry.OPERATIONS) & set(ops.__all__) - {"append"})  # hands on what it gets
SCHEMAS = {
    "verify_attention": (
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_len, Tensor ancestors, "
        "Tensor visual, float scale, Tensor? block_table, Tensor? plan_start, Tensor? plan_end, "
        "Tensor? plan_kind, Tensor? k_scale, Tensor? v_scale, bool scores, "
        "Tensor(w!)? workspace) -> "
        "(Tensor out, Tensor lse, Tensor visual_mass, Tensor visual_peak)"
    ),
    "accept": (
        "(Tensor logits, Tensor tokens, Tensor parents, Tensor num_slots, Tensor top_ids, "
        "Tensor top_logits, Tensor lse, Tensor entropy, Tensor? relevance, Tensor? regret_used, "
        "Tensor strict_ids, Tensor eos_ids, Tensor rule) -> "
        "(Tensor path, Tensor num_accepted, Tensor bonus_id, Tensor kind, Tensor regret)"
    ),
    "commit_kv": (
        "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor kv_len, Tensor path, "
        "Tensor num_accepted) -> ()"
    ),
    "rotary_angles": (
        "(Tensor positions, Tensor frequencies, Tensor dimensions, float scaling, "
        "ScalarType dtype) -> (Tensor, Tensor)"
    ),
}


def test_schemas():
    """By name and in order, as C++, Triton and who calls the operations themselves go by."""
    schemas = [getattr(torch.ops.lvspec, name).default._schema for name in SCHEMAS]
    assert [str(schema).removeprefix("lvspec::") for schema in schemas] == [
        name + schema for name, schema in SCHEMAS.items()
    ]


@pytest.mark.parametrize("name", registry.OPERATIONS)
def test_launchers_take_what_the_schema_says(name):
    pytest.importorskip("triton")
    launcher = getattr(importlib.import_module(f"lvspec.kernels.{name}"), name)
    schema = getattr(torch.ops.lvspec, name).default._schema
    taken = inspect.signature(launcher).parameters
    assert list(taken) == [argument.name for argument in schema.arguments]


@pytest.mark.parametrize("name", NAMES)
def test_checked_functions_take_what_the_reference_takes(name):
    """And a workspace besides."""
    ours, theirs = (
        [(x.name, x.kind, x.default) for x in inspect.signature(function).parameters.values()]
        for function in (getattr(ops, name), getattr(reference, name))
    )
    assert [x for x in ours if x[0] != "workspace"] == theirs


def test_a_backend_of_a_device_takes_precedence():
    given = {"logits": torch.randn(3, 5, 11), "top_k": 3}
    expected = ops.logit_stats(**given)

    def marked(logits, top_k, workspace):
        return tuple(x + 1 for x in reference.logit_stats(logits, top_k=top_k))

    with torch.library._scoped_library("lvspec", "IMPL") as library:
        library.impl("logit_stats", marked, "CPU")
        assert torch.equal(ops.logit_stats(**given).top_ids, expected.top_ids + 1)
    assert torch.equal(ops.logit_stats(**given).top_ids, expected.top_ids)


def test_backends():
    found = ops.backends()
    assert set(found) == {"reference", "cpp", "triton"}
    assert found["reference"]
    for name, backend in found.items():
        assert isinstance(backend.available, bool) and backend.reason, name


def test_request_for_a_backend(monkeypatch):
    for value, expected in (
        ("reference", "reference"),
        (" Reference", "reference"),
        ("auto", None),
    ):
        monkeypatch.setenv("LVSPEC_BACKEND", value)
        assert ops.requested_backend() == expected
    monkeypatch.setenv("LVSPEC_BACKEND", "cuda")
    with pytest.raises(ValueError, match="expected one of auto, reference, cpp, .*, got 'cuda'"):
        ops.requested_backend()


def test_request_that_cannot_be_met(monkeypatch):
    unavailable = [name for name, backend in ops.backends().items() if not backend]
    if not unavailable:
        pytest.skip("every backend is available here")
    monkeypatch.setenv("LVSPEC_BACKEND", unavailable[0])
    with pytest.raises(RuntimeError, match=f"LVSPEC_BACKEND={unavailable[0]}, but that backend is"):
        ops.requested_backend()


def test_request_is_read_at_import(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import lvspec.ops")
    env = {**os.environ, "LVSPEC_BACKEND": "abacus"}
    result = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert result.returncode != 0 and "got 'abacus'" in result.stderr
