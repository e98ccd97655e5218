"""write_float8 for the active backend: the same bytes as PyTorch's own conversion."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lvspec.ops.float8 import write_float8
from lvspec.reference import float8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
SHAPE = LAYERS, BATCH, HEADS, CAPACITY, DIM = 2, 3, 2, 11, 20


_SCHEMA = torch.ops.lvspec.write_float8.default._schema


def caches():
    return torch.full((2, *SHAPE), 3.0).to(float8.FLOAT8).unbind()


def factors():
    return torch.exp2(torch.randint(-4, 4, (2, LAYERS, BATCH, HEADS)).float()).unbind()


def rows_of(slots, dtype):
    """Strided, as projections leave them."""
    keys, values = (torch.randn(2, BATCH, slots, HEADS, DIM) * 20).to(dtype).transpose(2, 3)
    return keys, values


def check(keys, values, scales, kv_len, layer=1):
    """Rows that the cache has hold the rounded numbers, and all else is as it was."""
    k_cache, v_cache = caches()
    write_float8(keys, values, *scales, k_cache, v_cache, layer, kv_len)
    for cache, rows, scale in zip((k_cache, v_cache), (keys, values), scales, strict=True):
        wanted = caches()[0].float()
        for sequence, length in enumerate(kv_len.tolist()):
            for slot in range(rows.shape[2]):
                if 0 <= length + slot < CAPACITY:
                    wide = rows[sequence, :, slot].float() / scale[layer, sequence, :, None]
                    numbers = wide.clamp(-448, 448).to(float8.FLOAT8).float()
                    wanted[layer, sequence, :, length + slot] = numbers
        torch.testing.assert_close(cache.float(), wanted, rtol=0, atol=0, equal_nan=True)


@every_dtype
@pytest.mark.parametrize("slots", [1, 5])
def test_rows_behind_kv_len(dtype, slots):
    for kv_len in ([0, 3, 6], [CAPACITY - slots, 1, 0], [CAPACITY, -1, CAPACITY - 1]):
        lengths = torch.tensor(kv_len, dtype=torch.int32)
        check(*rows_of(slots, dtype), factors(), lengths)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, about NaN
@pytest.mark.parametrize("scale", [1.0, 0.25, 8.0])
def test_every_number(scale):
    """All bfloat16 numbers: ties, denormals, what is too large, infinities and NaN."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    rows = numbers.view(1, HEADS, -1, 256)
    slots = rows.shape[2]
    cache = torch.zeros(1, 1, HEADS, slots, 256).to(float8.FLOAT8)
    scales = torch.full((1, 1, HEADS), scale)
    start = torch.zeros(1, dtype=torch.int32)
    write_float8(rows, rows, scales, scales, cache, cache, 0, start)
    wanted = (rows.float() / scale).clamp(-448, 448).to(float8.FLOAT8).float()
    torch.testing.assert_close(cache[0].float(), wanted, rtol=0, atol=0, equal_nan=True)


def test_float64_is_the_specification():
    check(*(x.double() for x in rows_of(3, torch.float32)), factors(), torch.zeros(3).int())


def test_strided_caches():
    """Of one place, as a prompt's prefill sees it."""
    k_cache, v_cache = caches()
    keys, values = rows_of(2, torch.float32)
    scales = factors()
    whole = [x.clone() for x in (k_cache, v_cache)]
    lengths = torch.tensor([4, 0, 2], dtype=torch.int32)
    write_float8(keys, values, *scales, *whole, 0, lengths)
    for place in range(BATCH):
        one = slice(place, place + 1)
        write_float8(
            keys[one],
            values[one],
            *(scale[:, one].contiguous() for scale in scales),
            k_cache[:, one],
            v_cache[:, one],
            0,
            lengths[one],
        )
    assert torch.equal(k_cache.float(), whole[0].float())
    assert torch.equal(v_cache.float(), whole[1].float())


def test_who_writes():
    """What the schema says is written, by a trace without data; opcheck cannot copy float8."""
    given = (*rows_of(2, torch.float32), *factors(), *caches(), 0, torch.zeros(3).int())
    written = [x.alias_info is not None and x.alias_info.is_write for x in _SCHEMA.arguments]
    assert [x.name for x, is_ in zip(_SCHEMA.arguments, written) if is_] == ["k_cache", "v_cache"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert torch.ops.lvspec.write_float8(*given) is None
