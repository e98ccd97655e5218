"""commit_kv against a copy of the cache and one assignment a row."""

import random

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
    "sizes", [(1, 1, 1, 1, 1, 1), (3, 5, 2, 9, 31, 7), (2, 2, 1, 64, 64, 3), (1, 67, 1, 4, 9, 2)]
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


def test_nothing_accepted_and_nothing_to_do():
    cache = torch.randn(1, 2, 1, 8, 3)
    before = cache.clone()
    path = torch.tensor([[0, -1, -1], [0, 2, -1]], dtype=torch.int32)
    num_accepted = torch.tensor([0, -1], dtype=torch.int32)
    ops.commit_kv(cache, cache.clone(), torch.tensor([5, 5], dtype=torch.int32), path, num_accepted)
    assert torch.equal(cache, before)
