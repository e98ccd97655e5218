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
        close(PARTS.rms_norm(x, weight, eps), norm_of(weight, eps)(x).detach())


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 13, 37), (1, 64, 64)])
def test_add_rms_norm(shape, dtype):
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    total, norm = PARTS.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, residual + x)
    close(norm, norm_of(weight, 1e-6)(residual + x).detach())


@every_dtype
def test_norms_of_views(dtype):
    """Every other row, every other column, and heads that stand between others."""
    base = torch.randn(2, 6, 3, 40).to(dtype)
    weight = torch.randn(20).to(dtype)
    for x in (base[:, ::2, 1, 20:], base[:, :, 0, ::2], base[:, :, 1:, :20]):
        close(PARTS.rms_norm(x, weight, 1e-6), norm_of(weight, 1e-6)(x).detach())
        other = torch.randn(x.shape).to(dtype)
        for given in ((x, other), (other, x)):
            total, norm = PARTS.add_rms_norm(*given, weight, 1e-6)
            assert torch.equal(total, x + other)
            close(norm, norm_of(weight, 1e-6)(x + other).detach())


@every_dtype
def test_norms_keep_what_is_not_finite(dtype):
    x = torch.ones(1, 3, 5, dtype=dtype)
    x[0, 0, 2], x[0, 1, 1] = torch.nan, torch.inf
    weight = torch.ones(5, dtype=dtype)
    got = PARTS.rms_norm(x, weight, 1e-6)
    theirs = norm_of(weight, 1e-6)(x).detach()
    assert torch.equal(got.isnan(), theirs.isnan()) and got[0, 0].isnan().all()
    assert torch.equal(got[0, 2], theirs[0, 2])


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 13, 37), (1, 64, 40), (1, 2, 1100)])
def test_silu_multiply(shape, dtype):
    gate, up = (torch.randn(2, *shape) * 6).to(dtype)
    gate[0, 0, 0] = -200.0  # where exp overflows
    close(PARTS.silu_multiply(gate, up), functional.silu(gate) * up)
    wide = torch.stack((gate, up), dim=-1)
    views = wide.unbind(-1)
    close(PARTS.silu_multiply(*views), functional.silu(gate) * up)


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
        got = PARTS.rotary_angles(positions, frequencies, dimensions, 1.25, dtype)
        for ours, theirs in zip(got, module(x, positions), strict=True):
            close(ours, theirs)


def projected(x, head_dim):
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(
    ("batch_size", "slots", "q_heads", "kv_heads"), [(1, 1, 7, 1), (3, 13, 4, 2), (1, 64, 2, 2)]
)
def test_rotate_and_write(batch_size, slots, q_heads, kv_heads, head_dim, dtype):
    """One layer of a cache that is a view of a larger one; the rest keeps its bits."""
    q = torch.randn(batch_size, slots, q_heads * head_dim).to(dtype)
    k, v = torch.randn(2, batch_size, slots, kv_heads * head_dim).to(dtype)
    cos, sin = torch.randn(2, batch_size, slots, head_dim).to(dtype)
    shape = (3, 2, batch_size, kv_heads, slots + 9, 2 * head_dim)
    stored = torch.randn(shape).to(dtype)
    caches = stored[:, 0, ..., :head_dim], stored[:, 1, ..., 1::2]
    expected = [cache.clone() for cache in caches]
    kv_len = torch.tensor([4, 0, 9][:batch_size], dtype=torch.int32)
    theirs = qwen2_5.apply_rotary_pos_emb(projected(q, head_dim), projected(k, head_dim), cos, sin)
    for sequence, start in enumerate(kv_len.tolist()):
        rows = slice(start, start + slots)
        expected[0][1, sequence, :, rows] = theirs[1][sequence]
        expected[1][1, sequence, :, rows] = projected(v, head_dim)[sequence]
    before = stored.clone()
    got = PARTS.rotate_and_write(q, k, v, cos, sin, *caches, 1, kv_len)
    assert got.is_contiguous()
    close(got, theirs[0])
    close(caches[0][1], expected[0][1])
    assert torch.equal(caches[1], expected[1])
    before[1, 0, ..., :head_dim], before[1, 1, ..., 1::2] = caches[0][1], caches[1][1]
    assert torch.equal(stored, before)


def test_projections_of_other_strides():
    """As one product of all three would leave them, and with columns apart."""
    slots, head_dim = 5, 8
    together = torch.randn(2, slots, 2 * head_dim + 2 * head_dim)
    q, k, v = together.split([2 * head_dim, head_dim, head_dim], dim=-1)
    cos, sin = torch.randn(2, slots, head_dim, 2).unbind(-1)
    kv_len = torch.tensor([[1, 9], [3, 9]], dtype=torch.int32)[:, 0]
    caches = [torch.zeros(1, 2, 1, 9, head_dim) for _ in range(4)]
    got = PARTS.rotate_and_write(q, k, v, cos, sin, *caches[:2], 0, kv_len)
    packed = [x.contiguous() for x in (q, k, v, cos, sin)]
    again = PARTS.rotate_and_write(*packed, *caches[2:], 0, kv_len.contiguous())
    assert torch.equal(got, again)
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])
    assert caches[0][0, 1, 0, 3:8].abs().min() > 0 and not caches[0][0, 1, 0, 8].any()


@pytest.mark.parametrize("kv_len", [-1, -7, 6, 100])
def test_rows_outside_of_the_cache_are_not_written(kv_len):
    q = torch.randn(1, 3, 16)
    angles = torch.randn(2, 1, 3, 8)
    stored = torch.zeros(1, 1, 2, 12, 8)
    k_cache, v_cache = stored[..., 2:10, :], stored[..., 2:10, :].clone()
    lengths = torch.tensor([kv_len], dtype=torch.int32)
    PARTS.rotate_and_write(q, q, q, *angles, k_cache, v_cache, 0, lengths)
    inside = [row for row in range(kv_len, kv_len + 3) if 0 <= row < 8]
    for cache in (k_cache, v_cache):
        written = (cache[0, 0, 0] != 0).any(-1).nonzero().flatten().tolist()
        assert written == inside
    assert not stored[..., :2, :].any() and not stored[..., 10:, :].any()


def _calls():
    x = torch.randn(2, 3, 16)
    yield "rms_norm", (x, torch.ones(16), 1e-6)
    yield "add_rms_norm", (x, x.clone(), torch.ones(16), 1e-6)
    yield "silu_multiply", (x, x.clone())
    table = torch.tensor([0, 1, 2, 0], dtype=torch.int32)
    positions = torch.randint(0, 9, (3, 2, 3))
    yield "rotary_angles", (positions, torch.rand(4), table, 1.0, torch.bfloat16)
    caches = torch.zeros(2, 1, 2, 2, 9, 8).unbind(0)
    angles = torch.randn(2, 2, 3, 8).unbind(0)
    kv_len = torch.zeros(2, dtype=torch.int32)
    yield "rotate_and_write", (x, x.clone(), x.clone(), *angles, *caches, 0, kv_len)


@pytest.mark.parametrize("index", range(5))
def test_operators_are_registered_as_torch_expects(index):
    """Schemas say what is written, fakes have the shapes and types of the results."""
    name, arguments = list(_calls())[index]
    torch.library.opcheck(getattr(PARTS, name).default, arguments)
