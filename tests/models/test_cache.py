"""SlotCache: rows written in place at fixed addresses, taken back by length alone."""

import pytest
import torch

from lvspec.models.cache import SlotCache


@pytest.fixture
def cache(random_pair):
    """Two sequences with 4 and 7 committed positions, filled with numbers."""
    config = random_pair[0].config.text_config
    cache = SlotCache(
        config,
        batch_size=2,
        capacity=20,
        num_slots=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.k.normal_()
    cache.v.normal_()
    cache.kv_len.copy_(torch.tensor([4, 7]))
    return cache


def test_shapes_and_zeros(random_pair):
    config = random_pair[0].config.text_config
    cache = SlotCache(
        config,
        batch_size=3,
        capacity=11,
        num_slots=4,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    assert cache.k.shape == cache.v.shape == (2, 3, 2, 11, 64)
    assert cache.k.dtype == cache.v.dtype == torch.bfloat16
    assert cache.capacity == 11
    assert (cache.kv_len.dtype, cache.kv_len.shape) == (torch.int32, (3,))
    assert (cache.visual.dtype, cache.visual.shape) == (torch.uint8, (3, 11))
    assert (cache.positions.dtype, cache.positions.shape) == (torch.int64, (3, 3, 11))
    for tensor in (cache.k, cache.v, cache.kv_len, cache.visual, cache.positions):
        assert not tensor.any(), "what no pass wrote must not be NaN"


@pytest.mark.parametrize("slots", [1, 3])
def test_update_writes_behind_each_length(cache, slots):
    before_k, before_v = cache.k.clone(), cache.v.clone()
    new_k, new_v = torch.randn(2, 2, slots, 64), torch.randn(2, 2, slots, 64)
    cache.begin_step(slots)
    cache.update(new_k, new_v, 1)
    for tensor, before, new in ((cache.k, before_k, new_k), (cache.v, before_v, new_v)):
        for sequence, length in enumerate((4, 7)):
            before[1, sequence, :, length : length + slots] = new[sequence]
        assert tensor.equal(before), "these rows of this layer and nothing else"
    assert cache.kv_len.tolist() == [4, 7]


def test_update_returns_the_cache_itself(cache):
    addresses = (cache.k.data_ptr(), cache.v.data_ptr())
    for _ in range(3):
        cache.begin_step(2)
        for layer in range(2):
            new = torch.randn(2, 2, 2, 64)
            keys, values = cache.update(new, new, layer)
            assert keys.data_ptr() == cache.k[layer].data_ptr()
            assert values.data_ptr() == cache.v[layer].data_ptr()
            assert keys.shape == (2, 2, 20, 64)
        cache.kv_len += 2
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == addresses


def test_rollback_is_a_smaller_length(cache):
    """What was written behind `kv_len` is written over by the next step."""
    cache.begin_step(3)
    cache.update(torch.randn(2, 2, 3, 64), torch.randn(2, 2, 3, 64), 0)
    again = torch.randn(2, 2, 3, 64)
    cache.kv_len -= 1
    cache.begin_step(3)
    cache.update(again, again, 0)
    for sequence, length in enumerate((3, 6)):
        assert cache.k[0, sequence, :, length : length + 3].equal(again[sequence])


def test_prefill_view_fills_its_slot_only(cache):
    before = cache.k.clone()
    new = torch.randn(1, 2, 5, 64)
    keys, values = cache.prefill_view(1).update(new, -new, 0)
    assert keys.equal(new) and values.equal(-new), "prefill attends to the prompt, not the cache"
    before[0, 1, :, :5] = new[0]
    assert cache.k.equal(before)
    assert cache.v[0, 1, :, :5].equal(-new[0])
    assert cache.kv_len.tolist() == [4, 7], "finish_prefill says how long it is"


def test_finish_prefill(cache):
    cache.visual.fill_(1)
    other = cache.positions[:, 0].clone()
    positions = torch.tensor([[0, 1, 1, 9, 2], [0, 1, 1, 1, 2], [0, 1, 2, 1, 2]])
    cache.finish_prefill(1, positions, torch.tensor([False, True, True, True, False]))
    assert cache.kv_len.tolist() == [4, 5]
    assert cache.visual[1].tolist() == [0, 1, 1, 1] + [0] * 16
    assert cache.visual[0].all()
    assert cache.positions[:, 1, :5].equal(positions)
    assert cache.positions[:, 1, 5:].tolist() == [list(range(3, 18))] * 3
    assert cache.positions[:, 0].equal(other)


def test_prompt_that_fills_the_cache(cache):
    cache.finish_prefill(0, torch.arange(20).expand(3, -1), torch.zeros(20, dtype=torch.bool))
    assert cache.kv_len.tolist() == [20, 7]
