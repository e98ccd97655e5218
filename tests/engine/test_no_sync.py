"""An iteration reads nothing back from the device and allocates nothing as long as the context.

On the CPU every operation is seen by a dispatch mode, which refuses those that a GPU would have to
wait for.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from ways import WAYS

from lvspec import AcceptancePolicy, DecodeConfig
from lvspec.engine.decoder import Decoder

# What makes a GPU wait: the host asks for a value, or for a shape that depends on values.
READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "equal",
    "allclose",
    "repeat_interleave",
    "bincount",
}
POLICIES = {
    "strict": AcceptancePolicy.strict(),
    "lvspec": AcceptancePolicy.lvspec(regret_budget=3.0),
}


class _Watch(TorchDispatchMode):
    """Refuses reads, and keeps the bytes of the largest new tensor."""

    def __init__(self):
        super().__init__()
        self.largest, self.calls = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        is_masked = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        assert name not in READS and not is_masked, f"{name} reads values back"
        known = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        found = function(*args, **(kwargs or {}))
        self.calls += 1
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known:
                assert x.device.type == "cpu"
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return found


@pytest.fixture
def engine(random_pair, noisy_draft, make_prompt):
    """`engine(way, policy, batch_size, capacity)`: prompts are read, nothing is generated yet."""

    def make(way, policy="lvspec", batch_size=2, capacity=200):
        draft, options = WAYS[way]
        draft = copy.deepcopy(noisy_draft) if draft == "model" else draft
        config = DecodeConfig(
            gamma=5,
            max_new_tokens=60,
            eos_ids=(3,),
            cache_capacity=capacity,
            capture=False,
            **options,
        )
        decoder = Decoder(random_pair[0], draft, POLICIES[policy], config, batch_size=batch_size)
        # Where there is no CPU to look, a drafter does not look.
        if hasattr(decoder.engine.drafter, "_may_look"):
            decoder.engine.drafter._may_look = False
        for index in range(batch_size):
            inputs = make_prompt(3, ("video", 4, 6, 6), 5 + index, seed=index)
            decoder.engine.admit(decoder.request(inputs, index=index))
        return decoder.engine

    return make


def _watched(engine, iterations=3):
    with torch.inference_mode(), engine.attention():
        engine.run_phases()  # what is made once is made now
        with _Watch() as watch:
            for _ in range(iterations):
                engine.run_phases()
    assert watch.calls > 30
    return watch


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_read(engine, way, policy, batch_size):
    made = engine(way, policy, batch_size)
    before = made.state.num_out.tolist()
    _watched(made)
    assert all(n > m for n, m in zip(made.state.num_out.tolist(), before, strict=True))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_nothing_is_read_for_the_roots_alone(engine, batch_size):
    """What is found is told, though nothing of it is verified."""
    made = engine("n-grams", "strict", batch_size)
    made.drafter.only_root = True
    before = made.state.num_out.tolist()
    _watched(made)
    assert made.state.num_out.tolist() == [n + 4 for n in before], "a token in each of four"


@pytest.mark.parametrize("way", [way for way in WAYS if "n-grams" not in way])
def test_nothing_is_as_long_as_the_context(engine, way):
    """Ten times the cache, and the largest new tensor is what it was. (N-grams look at all ids.)"""
    short, long = (_watched(engine(way, capacity=capacity)) for capacity in (200, 2000))
    assert 0 < short.largest == long.largest


def test_state_stays_where_it_is(engine):
    made = engine("dynamic tree")
    tensors = [*made.state.tensors(), *made.cache.tensors(), *made.drafter.cache.tensors()]
    addresses = [x.data_ptr() for x in tensors]
    with torch.inference_mode(), made.attention():
        for _ in range(3):
            made.iterate()
    now = [*made.state.tensors(), *made.cache.tensors(), *made.drafter.cache.tensors()]
    assert [x.data_ptr() for x in now] == addresses


@pytest.mark.parametrize("read", [lambda x: int(x.sum()), lambda x: x[x > 0], torch.nonzero])
def test_the_watch_sees_a_read(read):
    with pytest.raises(AssertionError, match="reads values back"), _Watch():
        read(torch.ones(3))
    with _Watch() as watch:
        torch.zeros(5, 7)
    assert watch.largest == 140


def test_a_drafter_that_looks_is_seen(engine):
    made = engine("anchor stop")
    made.iteration.drafter = SimpleNamespace(
        propose=lambda *arguments: int(arguments[1].sum()), active=made.drafter.active
    )
    with pytest.raises(AssertionError, match="reads values back"), _Watch():
        made.run_phases()
