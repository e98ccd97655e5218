"""Small operations of HF's text models against the modules that they stand in for."""

import pytest
import torch
from torch.nn import functional
from transformers import Qwen2_5_VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from lvspec import ops

PARTS = torch.ops.lvspec
DTYPES = [dtype for dtype in ops.float_dtypes("cpu") if dtype != torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def close(ours, theirs):
    """To one rounding step of the largest number of a row in 16 bits, rarely even that far.

    Both round at the same places, so they differ only where float32 sums do that round apart. In
    float32 some steps: of the sum, the root, the quotient.
    """
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    eps = torch.finfo(ours.dtype).eps
    steps = 8 if ours.dtype == torch.float32 else 1
    error = (ours.double() - theirs.double()).abs()
    bound = steps * eps * theirs.double().abs().amax(-1, keepdim=True)
    assert (error <= bound).all(), (error / bound).max()
    if ours.dtype != torch.float32:
        assert (error > 0).double().mean() < 0.02


def norm_of(weight, eps):
    norm = qwen2_5.Qwen2_5_VLRMSNorm(weight.shape[0], eps=eps).to(weight.dtype)
    norm.weight.data = weight
    return norm


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 13, 37), (1, 64, 64), (2, 1, 200), (1, 2, 3, 80)])
def test_rms_norm(shape, dtype):
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None]).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    for eps in (1e-6, 1e-2):
        close(ops.rms_norm(x, weight, eps), norm_of(weight, eps)(x).detach())


@every_dtype
def test_norms_of_views(dtype):
    """Every other row, every other column, and heads that stand between others."""
    base = torch.randn(2, 6, 3, 40).to(dtype)
    weight = torch.randn(20).to(dtype)
    for x in (base[:, ::2, 1, 20:], base[:, :, 0, ::2], base[:, :, 1:, :20]):
        close(ops.rms_norm(x, weight, 1e-6), norm_of(weight, 1e-6)(x).detach())


@every_dtype
def test_norms_keep_what_is_not_finite(dtype):
    x = torch.ones(1, 3, 5, dtype=dtype)
    x[0, 0, 2], x[0, 1, 1] = torch.nan, torch.inf
    weight = torch.ones(5, dtype=dtype)
    got = ops.rms_norm(x, weight, 1e-6)
    theirs = norm_of(weight, 1e-6)(x).detach()
    assert torch.equal(got.isnan(), theirs.isnan()) and got[0, 0].isnan().all()
    assert torch.equal(got[0, 2], theirs[0, 2])


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 13, 37), (1, 64, 40), (1, 2, 1100)])
def test_silu_multiply(shape, dtype):
    gate, up = (torch.randn(2, *shape) * 6).to(dtype)
    gate[0, 0, 0] = -200.0  # where exp overflows
    close(ops.silu_multiply(gate, up), functional.silu(gate) * up)
    wide = torch.stack((gate, up), dim=-1)
    views = wide.unbind(-1)
    close(ops.silu_multiply(*views), functional.silu(gate) * up)


def rotary(family, head_dim):
    """HF's module, and which dimension of the positions its frequencies belong to."""
    half = head_dim // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    kind, config = {
        "qwen2_5_vl": (qwen2_5.Qwen2_5_VLRotaryEmbedding, Qwen2_5_VLTextConfig),
        "qwen3_vl": (qwen3.Qwen3VLTextRotaryEmbedding, Qwen3VLTextConfig),
    }[family]
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    module = kind(
        config(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            head_dim=head_dim,
            rope_parameters=parameters,
        )
    )
    if family == "qwen2_5_vl":
        dimensions = [i for i, size in enumerate(sections) for _ in range(size)]
    else:
        dimensions = [j % 3 if j < 3 * sections[j % 3] else 0 for j in range(half)]
    return module, torch.tensor(dimensions, dtype=torch.int32)


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_rotary_angles(family, head_dim, dtype):
    """Positions up to a million tokens; the dimensions differ, or their order would not matter."""
    module, dimensions = rotary(family, head_dim)
    module.attention_scaling = 1.25
    for shape, most in (((1, 1), 40), ((3, 13), 70_000), ((1, 64), 1_100_000)):
        positions = torch.randint(0, most, (3, *shape))
        positions = torch.stack((positions, positions), dim=-1)[..., 0]  # strided
        x = torch.zeros(*shape, 1, dtype=dtype)
        frequencies = module.inv_freq.to(x.device)
        got = ops.rotary_angles(positions, frequencies, dimensions, 1.25, dtype)
        for ours, theirs in zip(got, module(x, positions), strict=True):
            close(ours, theirs)


def projected(x, head_dim):
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("norms", [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize(
    ("batch_size", "slots", "q_heads", "kv_heads"), [(1, 1, 7, 1), (3, 13, 4, 2), (1, 64, 2, 2)]
)
def test_rotate_and_write(batch_size, slots, q_heads, kv_heads, head_dim, norms, dtype):
    """One layer of a cache that is a view of a larger one; the rest keeps its bits."""
    heads = q_heads + 2 * kv_heads
    qkv = torch.randn(batch_size, slots, heads * head_dim).to(dtype)
    weights = [torch.randn(head_dim).to(dtype) if there else None for there in norms]
    cos, sin = torch.randn(2, batch_size, slots, head_dim).to(dtype)
    shape = (3, 2, batch_size, kv_heads, slots + 9, 2 * head_dim)
    stored = torch.randn(shape).to(dtype)
    caches = stored[:, 0, ..., :head_dim], stored[:, 1, ..., head_dim:]
    expected = [cache.clone() for cache in caches]
    kv_len = torch.tensor([4, 0, 9][:batch_size], dtype=torch.int32)
    sizes = [count * head_dim for count in (q_heads, kv_heads, kv_heads)]
    q, k, v = (projected(x, head_dim) for x in qkv.split(sizes, dim=-1))
    q, k = (
        x if weight is None else norm_of(weight, 1e-5)(x).detach()
        for x, weight in zip((q, k), weights, strict=True)
    )
    theirs = qwen2_5.apply_rotary_pos_emb(q, k, cos, sin)
    for sequence, start in enumerate(kv_len.tolist()):
        rows = slice(start, start + slots)
        expected[0][1, sequence, :, rows] = theirs[1][sequence]
        expected[1][1, sequence, :, rows] = v[sequence]
    before = stored.clone()
    got = ops.rotate_and_write(qkv, cos, sin, *weights, 1e-5, *caches, 1, kv_len)
    assert got.is_contiguous()
    close(got, theirs[0])
    close(caches[0][1], expected[0][1])
    assert torch.equal(caches[1], expected[1])
    before[1, 0, ..., :head_dim], before[1, 1, ..., head_dim:] = caches[0][1], caches[1][1]
    assert torch.equal(stored, before)


def _calls():
    x = torch.randn(2, 3, 16)
    yield "rms_norm", (x, torch.ones(16), 1e-6)
    yield "silu_multiply", (x, x.clone())
    table = torch.tensor([0, 1, 2, 0], dtype=torch.int32)
    positions = torch.randint(0, 9, (3, 2, 3))
    yield "rotary_angles", (positions, torch.rand(4), table, 1.0, torch.float32)
    caches = torch.zeros(2, 1, 2, 2, 9, 8).unbind(0)
    angles = torch.randn(2, 2, 3, 8).unbind(0)
    kv_len = torch.zeros(2, dtype=torch.int32)
    qkv, weights = torch.randn(2, 3, (2 + 2 * 2) * 8), (torch.ones(8), torch.ones(8))
    yield "rotate_and_write", (qkv, *angles, *weights, 1e-6, *caches, 0, kv_len)
    yield "rotate_and_write", (qkv, *angles, None, None, 0.0, *caches, 0, kv_len)


@pytest.mark.parametrize("index", range(5))
def test_operators_are_registered_as_torch_expects(index):
    """Schemas say what is written, fakes have the shapes and types of the results."""
    name, arguments = list(_calls())[index]
    torch.library.opcheck(getattr(PARTS, name).default, arguments)
