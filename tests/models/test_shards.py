"""What several processes share, as far as one process can see it."""

import copy
import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from lvspec import environment
from lvspec.cli import main
from lvspec.models import pulse, ranks
from lvspec.models.loading import load_pair
from lvspec.models.model import Model
from lvspec.models.pulse import Pulse
from lvspec.models.ranks import Ranks
from lvspec.models.shards import (
    GatheredLinear,
    SharedEmbedding,
    SummedLinear,
    check_can_be_spread,
)

OPTION = "--tensor-parallel"


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in environment._OF_TORCHRUN:
        monkeypatch.delenv(name, raising=False)


class _Threads:
    """Ranks that are asked one after the other, and then told what all of them said."""

    def __init__(self, size):
        self.size, self.said = size, []

    def run(self, monkeypatch, call):
        """`call(ranks)` for every rank: what each has at the end."""
        found = []
        monkeypatch.setattr(dist, "get_world_size", lambda group: self.size)
        for is_known in (False, True):
            found = []
            for number in range(self.size):
                monkeypatch.setattr(dist, "get_rank", lambda group, number=number: number)
                self._connect(monkeypatch, number, is_known)
                found.append(call(Ranks(object())))
        return found

    def _connect(self, monkeypatch, number, is_known):
        def said(x):
            if not is_known:
                self.said.append(x.clone())
            return self.said if is_known else [x] * self.size

        def all_reduce(x, group):
            x.copy_(torch.stack(said(x)).sum(0))

        def all_gather(parts, x, group):
            for part, of in zip(parts, said(x), strict=True):
                part.copy_(of)

        def broadcast(x, group, group_src):
            x.copy_(said(x)[group_src])

        for message in (all_reduce, all_gather, broadcast):
            monkeypatch.setattr(dist, message.__name__, message)


@pytest.mark.parametrize(("rows", "size"), [(8, 2), (7, 3), (4, 3)])
def test_parts_are_the_whole(monkeypatch, rows, size):
    """Rows that cannot be divided evenly are cut as torch cuts them."""
    weight, x = torch.randn(rows, 6), torch.randn(2, 3, 6)
    parts = [*weight.chunk(size)]
    parts += [weight[:0]] * (size - len(parts))
    ids = torch.arange(rows).repeat(2, 1)

    def head(ranks):
        return GatheredLinear(nn.Parameter(parts[ranks.number]), rows, ranks)(x)

    def embedding(ranks):
        return SharedEmbedding(nn.Parameter(parts[ranks.number]), rows, ranks)(ids)

    with torch.no_grad():
        for found in _Threads(size).run(monkeypatch, head):
            torch.testing.assert_close(found, x @ weight.T)
        for found in _Threads(size).run(monkeypatch, embedding):
            assert found.equal(weight[ids])


def test_a_bias_is_added_once(monkeypatch):
    weight, bias, x = torch.randn(5, 6), torch.randn(5), torch.randn(2, 6)

    def call(ranks):
        own = slice(3 * ranks.number, 3 * ranks.number + 3)
        linear = SummedLinear(nn.Parameter(weight[:, own]), nn.Parameter(bias), ranks)
        return linear(x[:, own])

    with torch.no_grad():
        for found in _Threads(2).run(monkeypatch, call):
            torch.testing.assert_close(found, x @ weight.T + bias)


def test_the_first_rank_s_tensors(monkeypatch):
    """Of any dtypes and strides, NaN included."""

    def own(number):
        odd = torch.full((1, 2), number, dtype=torch.int32)[:, ::2]  # contiguous, with a stride
        flags = torch.tensor([number == 0, True, False])
        floats = torch.tensor([torch.nan, 0.5 + number], dtype=torch.float64)
        ids = torch.arange(6).view(2, 3)[:, ::2] + number
        return odd, flags, floats, torch.tensor(7 + number), ids, flags.to(torch.uint8)

    for found in _Threads(2).run(monkeypatch, lambda ranks: ranks.first(*own(ranks.number))):
        for ours, theirs in zip(found, own(0), strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_scores_are_the_mean_of_all_heads(monkeypatch):
    masses, peaks = torch.rand(2, 3, 2, 4, 5)  # layers, sequences, heads, slots

    def call(ranks):
        own = slice(2 * ranks.number, 2 * ranks.number + 2)
        return ranks.mean_of_heads(masses[:, :, own], peaks[:, :, own])

    for found in _Threads(2).run(monkeypatch, call):
        for ours, theirs in zip(found, (masses, peaks), strict=True):
            torch.testing.assert_close(ours, theirs.mean(2, keepdim=True))


def test_without_torchrun(no_torchrun, random_pair_folders, capsys):
    with pytest.raises(ValueError, match="^tensor_parallel: expected processes that torchrun has"):
        load_pair(*random_pair_folders, tensor_parallel=True)
    words = ["--video", "a.mp4", "--prompt", "what?", OPTION]
    assert main(["generate", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lvspec: error: {OPTION}: expected processes that torchrun has started")
    assert "got one without RANK, " in said


def test_beside_a_device(monkeypatch, random_pair_folders, capsys):
    for name in environment._OF_TORCHRUN:
        monkeypatch.setenv(name, "0")
    message = "^device, tensor_parallel: expected one of them, got device='cpu' and tensor_parallel"
    with pytest.raises(ValueError, match=message):
        load_pair(*random_pair_folders, device="cpu", tensor_parallel=True)
    words = ["--video", "a.mp4", "--prompt", "what?", "--device", "cpu", OPTION]
    assert main(["generate", *words]) == 2
    assert "--device, --tensor-parallel: expected one of them" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "kind"), [(3, "2 key and value"), (4, "2 key and value")])
def test_heads_that_cannot_be_divided(random_pair_folders, size, kind):
    config = AutoConfig.from_pretrained(random_pair_folders[0])
    check_can_be_spread(config, 2)
    message = rf"^tensor_parallel: .*--nproc-per-node\) that divides the target's {kind} heads"
    with pytest.raises(ValueError, match=f"{message}, got {size}$"):
        check_can_be_spread(config, size)


@pytest.mark.parametrize(
    ("config", "name"), [(Qwen3VLConfig, "Qwen3-VL"), (Qwen3VLMoeConfig, "Qwen3-VL-MoE")]
)
def test_families_that_cannot_be_spread(config, name):
    message = f"^tensor_parallel: expected a target whose layers .*, got {name}: .*tp_plan"
    with pytest.raises(ValueError, match=message):
        check_can_be_spread(config(), 2)


def test_a_model_that_somebody_else_has_spread(random_pair):
    model = copy.deepcopy(random_pair[0])
    model._tp_size = 2
    with pytest.raises(ValueError, match=r"^target: expected a whole model, .*\(2 parts\)$"):
        Model(model, "target")


def _pulses(ends):
    """Those of two ranks, whose threads are not started."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=5))
    return [Pulse(store, number, 2, ends.append) for number in range(2)]


def test_a_rank_that_is_silent(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    first, last = _pulses([])
    for count in range(40):  # both live
        assert first._look(count) is None and last._look(count) is None
        now[0] += pulse.BEAT
    for beat in range(int(pulse.SILENCE) - 1):  # one of them
        assert first._look(50 + beat) is None
        now[0] += pulse.BEAT
    now[0] += 2
    assert first._look(99) == "rank 1 gave no sign of life for 15 s"
    last._look(41)
    assert first._look(100) is None


def test_a_rank_that_never_comes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    first, _ = _pulses([])
    assert first._look(1) is None
    now[0] = pulse.SILENCE + 1
    assert "rank 1 gave no sign of life" in first._look(2)


def test_a_rank_that_leaves_and_one_that_fails(monkeypatch):
    """Whoever has done its work may be silent; an error is told at once, and stays told."""
    now = [0.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pulse, "GRACE", 0.0)
    ends = []
    first, last = _pulses(ends)
    last._stopped.set()
    last._run()
    assert first._look(1) is None
    now[0] = 1000.0
    assert first._look(2) is None
    first.fail(KeyError("a\nb"))
    assert last._look(5) == "rank 0 failed: KeyError: 'a\\nb'"
    _, again = _pulses(ends)
    again._store = first._store
    again._run()
    assert ends == ["rank 0 failed: KeyError: 'a\\nb'"]
    first._stopped.set()
    first._run()
    assert again._look(6) == ends[0]


def test_one_process_has_everything():
    """Nothing is sent, and nothing copied."""
    x = torch.randn(2, 3)
    assert ranks.ALONE.sum(x) is x and ranks.ALONE.first(x)[0] is x
    assert ranks.ALONE.value(3) == 3 and ranks.ALONE.all(False) is False
    assert ranks.ALONE.mean_of_heads(x, x)[0] is x


@pytest.mark.slow
def test_an_iteration_waits_for_no_message(fake_cuda, random_pair_folders):
    """On CUDA tensors without values; see tests/support/fake_ranks.py."""
    script = Path(__file__).parents[1] / "support" / "fake_ranks.py"
    names = "chain+dynamic tree+self+n-grams"
    done = fake_cuda(names, *random_pair_folders, script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, messages = done.stdout.splitlines()
    assert len(lines) == 2 * 4
    counts = json.loads(messages)
    assert set(counts) == {"all_reduce", "broadcast", "all_gather"} and min(counts.values()) > 14
