"""A greedy chain as one C++ operation, against its passes one by one."""

import copy
from functools import partial

import pytest
import torch

from lvspec import ops
from lvspec.models.head import DraftHead, draft_head
from lvspec.models.model import Model
from lvspec.phases.draft.passes import GoneOnChain, GreedyChain, run_phase

pytestmark = pytest.mark.skipif(ops.active_backend("cpu") != "cpp", reason="needs the C++")


@pytest.fixture
def draft(random_pair):
    return Model(copy.deepcopy(random_pair[1]), "draft")


def cache_of(draft):
    """Three sequences of random rows; the last but one token of the second is of a video."""
    generator = torch.Generator().manual_seed(0)
    cache = draft.new_cache(batch_size=3, capacity=40, num_slots=2)
    for x in (cache.k, cache.v):
        x.copy_(torch.randn(x.shape, generator=generator))
    cache.visual.zero_()
    cache.visual[1, 9] = 1
    cache.positions.copy_(torch.arange(40).expand_as(cache.positions))
    cache.kv_len.copy_(torch.tensor([5, 11, 0]))
    return cache


def both(draft, phase, last):
    """(ids, kv_len, keys) at once and pass by pass."""
    own_length = torch.tensor([7, 10, 0], dtype=torch.int32)
    for at_once in (True, False):
        cache = cache_of(draft)
        with torch.inference_mode(), draft.active():
            if at_once:
                assert draft.chain(last.numel(), phase.head) is not None
                ids = run_phase(phase, draft, cache, last, own_length)
            else:
                step = partial(draft.step, cache=cache, head=phase.head)
                ids = phase.run(step, last, own_length, cache)
        yield ids, cache.kv_len, cache.k, cache.v


@pytest.mark.parametrize("known", [None, tuple(range(3, 200, 7))], ids=["all", "some"])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", [GreedyChain, GoneOnChain])
def test_equals_its_passes(draft, kind, count, known):
    head = draft_head(draft.hf.lm_head, 200, known)
    last = torch.tensor([[4, 9], [250, 17], [0, 0]])  # 250 is the target's alone
    phase = kind(head, count)
    ours, theirs = both(draft, phase, last if kind is GreedyChain else last[:, 1:])
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)
    assert ours[0].shape == (3, count) and ours[0].dtype == torch.int64
    assert known is None or set(ours[0].flatten().tolist()) <= set(known)


@pytest.mark.parametrize("number", [0.0, float("nan"), float("inf")])
def test_the_first_of_the_best_is_chosen(draft, number):
    """As by argmax: of equal logits, and a NaN before all else."""
    with torch.no_grad():
        weight = draft.hf.lm_head.weight
        weight[:] = 0 if number == 0 else weight
        weight[[30, 50]] = number
    phase = GreedyChain(DraftHead(draft.hf.lm_head, 200), 3)
    ours, theirs = both(draft, phase, torch.tensor([[4, 9]] * 3))
    assert torch.equal(ours[0], theirs[0])
    assert number != 0 or not ours[0].any()


def test_a_cache_without_room(draft):
    """Refused by name before anything is written behind it."""
    cache = cache_of(draft)
    cache.kv_len.fill_(39)
    phase = GoneOnChain(DraftHead(draft.hf.lm_head, 200), 3)
    with torch.inference_mode(), draft.active():
        with pytest.raises(RuntimeError, match="expected kv_len with room for the slots"):
            run_phase(phase, draft, cache, torch.zeros(3, 1, dtype=torch.int64), cache.kv_len)
