"""commit_kv against a copy of the cache and one assignment a row."""

import random

import numpy
import pytest
import torch

from lvspec import ops


def random_paths(batch_size, num_slots):
    """Increasing slots from 0 on, padded with -1."""
    path = torch.full((batch_size, num_slots), -1, dtype=torch.int32)
    num_accepted = torch.zeros(batch_size, dtype=torch.int32)
    for b in range(batch_size):
        slots = [0, *sorted(random.sample(range(1, num_slots), random.randrange(num_slots)))]
        path[b, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
        num_accepted[b] = len(slots) - 1
    return path, num_accepted


def moved(cache, kv_len, path, num_accepted):
    result = cache.clone()
    for b in range(len(kv_len)):
        for i in range(int(num_accepted[b]) + 1):
            source, target = kv_len[b] + path[b, i], kv_len[b] + i
            result[:, b, :, target] = cache[:, b, :, source]
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize(
    "sizes",  # L, B, Hkv, S, N, D
    [
        (1, 1, 1, 1, 1, 1),
        (3, 5, 2, 9, 31, 7),
        (2, 2, 1, 64, 64, 3),
        (1, 67, 1, 4, 9, 2),
        (1, 2, 1, 64, 70, 256),  # more than one chunk of D, the last of them full
        (1, 1, 2, 33, 40, 130),
    ],
    ids=str,
)
def test_moves(sizes, dtype):
    layers, batch_size, heads, num_slots, capacity, head_dim = sizes
    shape = (layers, batch_size, heads, capacity, head_dim)
    k_cache = torch.randint(-128, 128, shape).to(dtype)
    v_cache = torch.randint(-128, 128, shape).to(dtype)
    kv_len = torch.randint(0, capacity - num_slots + 1, (batch_size,), dtype=torch.int32)
    path, num_accepted = random_paths(batch_size, num_slots)
    expected = [moved(cache, kv_len, path, num_accepted) for cache in (k_cache, v_cache)]
    assert ops.commit_kv(k_cache, v_cache, kv_len, path, num_accepted) is None
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])


def test_nan_moves_bit_by_bit():
    bits = torch.randint(0, 2**16, (1, 2, 1, 12, 5), dtype=torch.int32).to(torch.int16)
    cache = bits.view(torch.bfloat16)
    kv_len = torch.tensor([3, 0], dtype=torch.int32)
    path, num_accepted = random_paths(2, 9)
    expected = moved(bits, kv_len, path, num_accepted)
    ops.commit_kv(cache, cache.clone(), kv_len, path, num_accepted)
    assert torch.equal(cache.view(torch.int16), expected)


def test_one_layer_and_strided_views():
    storage = torch.randn(4, 2, 20, 3, 6)
    k_cache = storage[:2].permute(1, 0, 3, 2, 4)[0]  # [B, Hkv, N, D], no dimension contiguous
    v_cache = storage[2:].permute(1, 0, 3, 2, 4)[1]
    kv_len = torch.tensor([5, 11], dtype=torch.int32)
    path, num_accepted = random_paths(2, 9)
    untouched = storage[:2, 1].clone()
    expected = [moved(cache[None], kv_len, path, num_accepted)[0] for cache in (k_cache, v_cache)]
    ops.commit_kv(k_cache, v_cache, kv_len, path, num_accepted)
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])
    assert torch.equal(storage[:2, 1], untouched)


def test_float8():
    cache = torch.randn(2, 3, 2, 15, 20).to(torch.float8_e4m3fn)
    kv_len = torch.tensor([0, 4, 6], dtype=torch.int32)
    path, num_accepted = random_paths(3, 9)
    expected = moved(cache.view(torch.int8), kv_len, path, num_accepted)
    ops.commit_kv(cache, cache.clone(), kv_len, path, num_accepted)
    assert torch.equal(cache.view(torch.int8), expected)


def test_every_layout_of_its_own():
    """K and V with strides that have nothing in common; D is the slow dimension of V."""
    k_cache = torch.randn(3, 2, 25, 2, 8).transpose(2, 3)[..., :5]
    v_cache = torch.randn(2, 5, 3, 2, 50).permute(2, 0, 3, 4, 1)[:, :, :, ::2]
    assert k_cache.shape == v_cache.shape
    kv_len = torch.tensor([5, 0, 16, 0], dtype=torch.int32)[::2]
    path, num_accepted = random_paths(2, 9)
    wide = torch.full((9, 2), 77, dtype=torch.int32)
    wide.copy_(path.T)
    expected = [moved(cache, kv_len, path, num_accepted) for cache in (k_cache, v_cache)]
    ops.commit_kv(k_cache, v_cache, kv_len, wide.T, num_accepted)
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])


def test_everything_is_read_before_anything_is_written():
    """Rows that change places, which no order of copies one by one could do."""
    cache = torch.randn(1, 1, 1, 20, 33)
    kv_len, count = (torch.tensor([n], dtype=torch.int32) for n in (7, 12))
    path = torch.arange(12, -1, -1, dtype=torch.int32)[None]
    expected = cache.clone()
    expected[:, :, :, 7:] = cache[:, :, :, 7:].flip(3)
    ops.commit_kv(cache, cache.clone(), kv_len, path, count)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("count", [-1, 0, 2])
def test_what_stands_behind_the_path_is_not_followed(count):
    cache = torch.randn(2, 1, 2, 9, 6)
    kv_len, num_accepted = (torch.tensor([n], dtype=torch.int32) for n in (4, count))
    path = torch.tensor([[0, 2, 3, 10**6, 2**31 - 1]], dtype=torch.int32)
    expected = moved(cache, kv_len, path, num_accepted)
    ops.commit_kv(cache, cache.clone(), kv_len, path, num_accepted)
    assert torch.equal(cache, expected)


def test_up_to_the_last_row_of_the_cache():
    cache = torch.randn(2, 2, 1, 8, 3)
    kv_len = torch.tensor([4, 5], dtype=torch.int32)  # the second has room for 3 of its 4 slots
    path = torch.tensor([[0, 3, -1, -1], [0, 2, -1, -1]], dtype=torch.int32)
    num_accepted = torch.ones(2, dtype=torch.int32)
    expected = moved(cache, kv_len, path, num_accepted)
    ops.commit_kv(cache, cache.clone(), kv_len, path, num_accepted)
    assert torch.equal(cache, expected)


def test_offsets_beyond_32_bits():
    """Rows 2^27 apart; numpy's zeros are not in memory until they are written."""
    storage = torch.from_numpy(numpy.zeros(18 << 27, dtype=numpy.int8))
    storage = storage.to(torch.get_default_device())
    cache = storage.as_strided((1, 1, 1, 18, 2), (0, 0, 0, 1 << 27, 1))
    cache.copy_(torch.arange(36).view(1, 1, 1, 18, 2))
    kv_len, count = (torch.tensor([n], dtype=torch.int32) for n in (13, 1))
    path = torch.tensor([[0, 4]], dtype=torch.int32)
    path = torch.cat([path, torch.full((1, 3), -1, dtype=torch.int32)], 1)
    expected = moved(cache, kv_len, path, count)
    ops.commit_kv(cache, torch.zeros(1, 1, 1, 18, 2, dtype=torch.int8), kv_len, path, count)
    assert torch.equal(cache, expected)


def test_nothing_accepted_and_nothing_to_do():
    cache = torch.randn(1, 2, 1, 8, 3)
    before = cache.clone()
    path = torch.tensor([[0, -1, -1], [0, 2, -1]], dtype=torch.int32)
    num_accepted = torch.tensor([0, -1], dtype=torch.int32)
    ops.commit_kv(cache, cache.clone(), torch.tensor([5, 5], dtype=torch.int32), path, num_accepted)
    assert torch.equal(cache, before)
