"""Statistics and trace: right numbers, and not one operation on the device until they are read."""

import copy
import json
import math
import time
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lvspec import AcceptancePolicy, DecodeConfig, generate, warmup
from lvspec.engine import stats
from lvspec.engine.result import Trace
from lvspec.engine.stats import PHASES, DecodeStats, Moment, PhaseTimer
from lvspec.models import own_passes
from lvspec.ops import Acceptance, LogitStats
from lvspec.phases.draft import Draft, DraftShape
from lvspec.phases.outcome import Rows, Traced

CPU = torch.device("cpu")


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def filled():
    """Three iterations of five drafts; eleven tokens, of which one is the prefill's."""
    filled = DecodeStats(CPU, 5)
    for accepted in (3, 0, 5):
        filled.add(accepted, 6, 0.5 * accepted)
    kinds = torch.tensor([3, 0, 1, 0, 3, 3, 0, 2, 0, 0, 1, 3], dtype=torch.uint8)
    filled.close(kinds)
    return filled


def test_numbers_written_by_hand(filled):
    assert filled.num_iterations == 3
    assert filled.num_accepted == [3, 0, 5]
    assert filled.tau == pytest.approx(8 / 3 + 1)
    assert filled.acceptance_by_position == [2 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3]
    assert filled.regret == 2.5
    assert filled.counts == {"exact": 5, "loose": 2, "shift": 1, "bonus": 4, "rejected": 7}


def test_to_dict_is_json(filled):
    values = json.loads(json.dumps(filled.to_dict()))
    assert values["tau"] == pytest.approx(11 / 3)
    assert (values["iterations"], values["gamma"], values["regret"]) == (3, 5, 2.5)
    assert values["counts"] == filled.counts
    assert set(values["seconds"]) == set(PHASES)


def test_without_a_pass():
    empty = DecodeStats(CPU, 5)
    assert math.isnan(empty.tau)
    assert (empty.num_accepted, empty.acceptance_by_position, empty.regret) == ([], [], 0.0)
    assert set(empty.counts.values()) == {0}
    assert json.loads(json.dumps(empty.to_dict()))["tau"] is None


def test_phase_timer(monkeypatch):
    clock = iter([1.0, 1.5, 2.0, 2.25, 10.0, 14.0])
    monkeypatch.setattr(stats.time, "perf_counter", lambda: next(clock))
    timer = PhaseTimer(CPU)
    with timer.phase("draft"):
        pass
    with pytest.raises(KeyError), timer.phase("verify"):
        raise KeyError
    with timer.phase("draft"):
        pass
    assert timer.seconds() == {**dict.fromkeys(PHASES, 0.0), "draft": 4.5, "verify": 0.25}


def test_what_is_behind_the_end_does_not_count():
    """Five drafts, four accepted, of which the last of three is a draft token and no bonus."""
    ended = DecodeStats(CPU, 5)
    ended.add(5, 6, 0.5)
    ended.add(4, 6, 0.75, num_tokens=3, num_anchors=2)
    ended.close(torch.tensor([3, 0, 0, 1, 0, 0, 3, 0, 0, 0], dtype=torch.uint8))
    assert (ended.num_accepted, ended.num_emitted, ended.tau) == ([5, 2], 9, 4.5)
    assert ended.acceptance_by_position == [1, 1, 1, 1, 0.5], "about what was verified"
    assert (ended.num_drafted, ended.num_anchors, ended.regret) == (10, 2, 0.75)
    assert ended.counts == {"exact": 7, "loose": 1, "shift": 0, "bonus": 2, "rejected": 1}


@pytest.mark.parametrize(
    "tokens, anchors, gate",
    [(31, 0, "on"), (32, 0, "flags nothing"), (100, 1, "on"), (101, 1, "flags nothing")]
    + [(32, 32, "flags everything"), (100, 99, "on"), (101, 100, "flags everything")],
)
def test_gate_in_a_word(tokens, anchors, gate):
    found = DecodeStats(CPU, 200)
    assert found.gate == "none" and found.anchor_share is None
    found.is_gated = True
    assert found.gate == "on" and found.anchor_share is None
    found.add(tokens - 1, 201, 0.0, num_anchors=anchors)
    assert found.gate == gate and found.anchor_share == anchors / tokens
    assert found.to_dict()["anchor_share"] == anchors / tokens
    found.is_text = True
    assert found.gate == "strict" and found.anchor_share is None


def test_warm_up_is_no_part_of_a_phase(monkeypatch):
    """Two seconds of four; one within another counts once, and what fails counts too."""
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(warmup, "perf_counter", lambda: next(clock))
    before = warmup.warm_up_seconds()
    start = Moment(0.0, before)

    @warmup.warming_up()
    def record():
        with warmup.warming_up():
            raise KeyError

    with pytest.raises(KeyError):
        record()
    timer = PhaseTimer(CPU)
    timer.add("verify", start, Moment(4.0, warmup.warm_up_seconds()))
    assert timer.seconds() == {**dict.fromkeys(PHASES, 0.0), "verify": 2.0, "warm-up": 2.0}


def test_a_first_call_tells_its_warm_up_apart(random_pair, make_prompt, monkeypatch):
    """Planning is made slow: no phase has it, and a second call has none."""
    pair = [copy.deepcopy(model) for model in random_pair]
    plain, planned = own_passes.plan_of, []

    def slow(text):
        planned.append(time.sleep(0.3))
        return plain(text)

    monkeypatch.setattr(own_passes, "plan_of", slow)
    config = DecodeConfig(gamma=5, max_new_tokens=12, eos_ids=())
    start = time.perf_counter()
    first = generate(*pair, make_prompt(3, ("video", 4, 6, 6), 5), config=config).stats.seconds
    elapsed = time.perf_counter() - start
    assert len(planned) == 2 and 0.6 <= first["warm-up"] < elapsed
    assert sum(first.values()) < elapsed
    second = generate(*pair, make_prompt(3, ("video", 4, 6, 6), 5), config=config).stats.seconds
    assert second["warm-up"] == 0 and min(second["draft"], second["verify"]) > 0


def test_recording_reads_nothing():
    """Meta tensors hold no values: whatever reads one fails."""
    meta = DecodeStats(CPU, 5)
    meta.add(3, 6, 0.0)
    meta.close(torch.zeros(9, dtype=torch.uint8, device="meta"))
    assert (meta.num_iterations, meta.tau, meta.num_drafted) == (1, 4.0, 5)
    with pytest.raises((RuntimeError, NotImplementedError), match="[Mm]eta"):
        _ = meta.counts
    trace, ids = Trace(), torch.zeros(1, 6, dtype=torch.int64, device="meta")
    draft = Draft(ids, DraftShape.chain(5, batch_size=1, device=torch.device("meta")))
    num_accepted = _int32(3).to("meta")
    acceptance = Acceptance(ids, num_accepted, num_accepted, ids, ids)
    rows = Rows.of(*_rows_on_meta(draft))
    trace.add(Traced(draft, ids, ids.float(), ids[:, 0].float(), acceptance, rows))
    with pytest.raises((RuntimeError, NotImplementedError), match="[Mm]eta"):
        trace.steps()


def _rows_on_meta(draft):
    """Logits, the draft, and what is found of them."""
    floats = torch.zeros(1, 6, device="meta")
    top = torch.zeros(1, 6, 5, device="meta")
    return torch.zeros(1, 6, 9, device="meta"), draft, LogitStats(top.int(), top, floats, floats)


READS = (
    "item",
    "is_nonzero",
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "tolist",
    "to",
    "_to_copy",
)


class _Operations(TorchDispatchMode):
    """Counts every operation on tensors by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def operations(random_pair, noisy_draft, make_prompt, monkeypatch):
    """`operations(**config)`: how often a generation calls each operation, and `tolist`."""
    inputs = make_prompt(3, ("video", 4, 6, 6), 5)

    def run(**config):
        config = DecodeConfig(gamma=5, max_new_tokens=24, eos_ids=(), **config)
        policy = AcceptancePolicy.lvspec(top_k=2)
        generate(random_pair[0], noisy_draft, inputs, policy=policy, config=config)

    def count(**config):
        plain = torch.Tensor.tolist
        with monkeypatch.context() as patch, _Operations() as mode:

            def counted(tensor):
                mode.counts["tolist"] += 1
                return plain(tensor)

            patch.setattr(torch.Tensor, "tolist", counted)
            run(**config)
        return mode.counts

    run()  # what is made once per process is made now
    count()
    return count


def test_statistics_cost_no_operation(operations, monkeypatch):
    with_them = operations()
    assert with_them["_local_scalar_dense"] > 0, "the loop itself does read"
    for name in ("add", "close"):
        monkeypatch.setattr(DecodeStats, name, lambda *args, **kwargs: None)
    assert operations() == with_them


def test_a_trace_reads_nothing(operations):
    """It costs copies and, where rows are kept, a few small operations on what is there."""
    with_it, without = operations(trace=True), operations()
    reads = [name for name in READS if name != "_to_copy"]
    assert [with_it[name] for name in reads] == [without[name] for name in reads]
    on_device = "clone select _to_copy gather clamp sub mul add view unsqueeze slice".split()
    assert set(with_it - without) <= set(on_device)
    # Slots before, and ids of the best, to int64: nothing else is converted, nor goes elsewhere.
    iterations = (with_it - without)["_to_copy"] / 2
    assert iterations == (with_it - without)["sub"] / 3 > 1
    assert not without - with_it


def test_reading_is_seen(operations, monkeypatch):
    """The counts above can tell."""
    before = operations()
    monkeypatch.setattr(DecodeStats, "add", lambda *args, **kwargs: int(torch.ones(1)))
    assert operations()["_local_scalar_dense"] > before["_local_scalar_dense"]
    monkeypatch.setattr(DecodeStats, "add", lambda *a, **k: torch.ones(1).tolist())
    assert operations()["tolist"] > before["tolist"]


def test_times_of_a_generation(random_pair, make_prompt):
    inputs = make_prompt(3, ("video", 4, 6, 6), 5)
    start = time.perf_counter()
    config = DecodeConfig(gamma=5, max_new_tokens=12, eos_ids=())
    generation = generate(*random_pair, inputs, config=config)
    elapsed = time.perf_counter() - start
    seconds = generation.stats.seconds
    eager = set(PHASES) - {"capture", "iteration", "warm-up"}
    assert {phase for phase in PHASES if seconds[phase] > 0} - {"warm-up"} == eager
    assert sum(seconds.values()) < elapsed
    alone = generate(random_pair[0], None, inputs, config=config).stats
    assert {phase for phase in PHASES if alone.seconds[phase] > 0} - {"warm-up"} == eager
    assert json.dumps(generation.to_dict())
