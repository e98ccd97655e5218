"""Rotation, head norms and the write to the cache against HF's code, for the active backend."""

import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from lvspec import ops, reference

rotate_and_write = ops.rotate_and_write
DTYPES = [dtype for dtype in ops.float_dtypes("cpu") if dtype != torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
EPS = 1e-2


def close(ours, theirs):
    """To one rounding step of the largest number of a row; both round at the same places."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    steps = 8 if ours.dtype == torch.float32 else 1
    bound = steps * torch.finfo(ours.dtype).eps * theirs.double().abs().amax(-1, keepdim=True)
    error = (ours.double() - theirs.double()).abs()
    assert (error <= bound).all(), (error / bound).max()
    if ours.dtype != torch.float32:
        assert (error > 0).double().mean() < 0.02


def normed(x, weight):
    if weight is None:
        return x
    norm = qwen3.Qwen3VLTextRMSNorm(weight.shape[0], eps=EPS).to(weight.dtype)
    norm.weight.data = weight
    return norm(x).detach()


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("normed_heads", ["", "qk", "q", "k"])
@pytest.mark.parametrize(
    ("batch_size", "slots", "q_heads", "kv_heads"), [(1, 1, 7, 1), (3, 5, 4, 2)]
)
def test_against_hf(batch_size, slots, q_heads, kv_heads, normed_heads, head_dim, dtype):
    """One layer of a cache that is a view of a larger one; the rest keeps its bits."""
    heads = torch.randn(batch_size, slots, q_heads + 2 * kv_heads, head_dim)
    heads = (heads * torch.logspace(-1, 1, heads.shape[2])[:, None]).to(dtype)
    cos, sin = torch.randn(2, batch_size, slots, head_dim).to(dtype)
    norms = [torch.randn(head_dim).to(dtype) if x in normed_heads else None for x in "qk"]
    shape = (3, 2, batch_size, kv_heads, slots + 9, 2 * head_dim)
    stored = torch.randn(shape).to(dtype)
    caches = stored[:, 0, ..., :head_dim], stored[:, 1, ..., 1::2]
    expected = [cache.clone() for cache in caches]
    kv_len = torch.tensor([4, 0, 9][:batch_size], dtype=torch.int32)
    q, k, v = heads.transpose(1, 2).split([q_heads, kv_heads, kv_heads], dim=1)
    theirs = qwen2_5.apply_rotary_pos_emb(normed(q, norms[0]), normed(k, norms[1]), cos, sin)
    for sequence, start in enumerate(kv_len.tolist()):
        rows = slice(start, start + slots)
        expected[0][1, sequence, :, rows] = theirs[1][sequence]
        expected[1][1, sequence, :, rows] = v[sequence]
    before = stored.clone()
    got = rotate_and_write(heads.flatten(2), cos, sin, *norms, EPS, *caches, 1, kv_len)
    assert got.is_contiguous()
    close(got, theirs[0])
    close(caches[0][1], expected[0][1])
    assert torch.equal(caches[1], expected[1])
    before[1, 0, ..., :head_dim], before[1, 1, ..., 1::2] = caches[0][1], caches[1][1]
    assert torch.equal(stored, before)


def test_specification_by_literals():
    """A query and a key of root mean square 5, turned by a quarter."""
    qkv = torch.tensor([[[7.0, 1.0, -1.0, 7.0, 2.0, 3.0]]], dtype=torch.float64)
    cos = torch.zeros(1, 1, 2, dtype=torch.float64)
    norms = torch.tensor([[1.0, 2.0], [10.0, 5.0]], dtype=torch.float64)
    caches = torch.zeros(2, 1, 1, 1, 3, 2, dtype=torch.float64)
    kv_len = torch.tensor([1], dtype=torch.int32)
    q = reference.rotate_and_write(qkv, cos, cos + 1, *norms, 0.0, *caches, 0, kv_len)
    torch.testing.assert_close(q.flatten().tolist(), [-0.4, 1.4])
    keys, values = caches[:, 0, 0, 0].tolist()
    torch.testing.assert_close(keys, [[0.0, 0.0], [-7.0, -2.0], [0.0, 0.0]])
    assert values == [[0.0, 0.0], [2.0, 3.0], [0.0, 0.0]]


def test_operands_of_other_strides():
    """Columns apart, a slot of a longer row, and lengths that are a column of a table."""
    slots, head_dim = 5, 8
    qkv = torch.randn(2, slots, 4 * head_dim, 2)[..., 0]
    cos, sin = torch.randn(2, slots, head_dim, 2).unbind(-1)
    kv_len = torch.tensor([[1, 9], [3, 9]], dtype=torch.int32)[:, 0]
    caches = [torch.zeros(1, 2, 1, 9, head_dim) for _ in range(4)]
    got = rotate_and_write(qkv, cos, sin, None, None, 0.0, *caches[:2], 0, kv_len)
    packed = [x.contiguous() for x in (qkv, cos, sin)]
    again = rotate_and_write(*packed, None, None, 0.0, *caches[2:], 0, kv_len.contiguous())
    assert torch.equal(got, again)
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])
    assert caches[0][0, 1, 0, 3:8].abs().min() > 0 and not caches[0][0, 1, 0, 8].any()


@pytest.mark.parametrize("kv_len", [-1, -7, 6, 100])
def test_rows_outside_of_the_cache_are_not_written(kv_len):
    qkv = torch.randn(1, 3, 48)
    angles, norm = torch.randn(2, 1, 3, 8), torch.ones(8)
    stored = torch.zeros(1, 1, 2, 12, 8)
    k_cache, v_cache = stored[..., 2:10, :], stored[..., 2:10, :].clone()
    lengths = torch.tensor([kv_len], dtype=torch.int32)
    rotate_and_write(qkv, *angles, norm, norm, EPS, k_cache, v_cache, 0, lengths)
    inside = [row for row in range(kv_len, kv_len + 3) if 0 <= row < 8]
    for cache in (k_cache, v_cache):
        written = (cache[0, 0, 0] != 0).any(-1).nonzero().flatten().tolist()
        assert written == inside
    assert not stored[..., :2, :].any() and not stored[..., 10:, :].any()


@pytest.mark.skipif(ops.active_backend("cpu") != "cpp", reason="others take other types")
@pytest.mark.parametrize("changed", range(6))
def test_the_cpp_reads_no_other_types(changed):
    """What `ops` gives to PyTorch is refused, not read as if it were float32."""
    caches = torch.zeros(2, 1, 1, 2, 9, 8).unbind(0)
    tensors = [torch.randn(1, 3, 48), *torch.randn(2, 1, 3, 8), torch.ones(8), *caches]
    tensors[changed] = tensors[changed].bfloat16()
    qkv, cos, sin, norm, k_cache, v_cache = tensors
    kv_len = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="another dtype than the C\\+\\+ takes"):
        torch.ops.lvspec.rotate_and_write(
            qkv, cos, sin, norm, norm, EPS, k_cache, v_cache, 0, kv_len
        )


@pytest.mark.parametrize("has_norms", [False, True])
def test_the_operator_is_registered_as_torch_expects(has_norms):
    """The schema says what is written, the fake has the shape and type of the result."""
    norm = torch.ones(8) if has_norms else None
    caches = torch.zeros(2, 1, 2, 2, 9, 8).unbind(0)
    angles = torch.randn(2, 2, 3, 8).unbind(0)
    kv_len = torch.zeros(2, dtype=torch.int32)
    arguments = (torch.randn(2, 3, 56), *angles, norm, norm, EPS, *caches, 0, kv_len)
    torch.library.opcheck(torch.ops.lvspec.rotate_and_write.default, arguments)
