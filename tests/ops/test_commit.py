"""commit: what was accepted becomes output; csrc/append.h does what PyTorch does."""

from types import SimpleNamespace

import pytest
import torch
from policies import begin, strict_rules

from lvspec import ops
from lvspec.engine.mailbox import Report
from lvspec.phases.accept import regrets
from lvspec.phases.commit import commit
from lvspec.phases.draft import Draft, DraftShape
from lvspec.phases.state import DecodeState
from lvspec.reference.append import HEAD, NO_NAN, append
from lvspec.reference.kinds import BONUS


def case(seed, dtype=torch.float32):
    """Arguments of `append`: a random path, ends of sequence, sequences that are finished."""
    torch.manual_seed(seed)  # and no generator: the default device may be another
    draw = lambda low, high, *shape: torch.randint(low, high, shape)
    batch, slots = int(draw(1, 5)), int(draw(1, 65))
    state = DecodeState(
        batch_size=batch,
        max_new_tokens=int(draw(1, 40)),
        num_slots=slots,
        rules=strict_rules(batch, draw(0, 30, int(draw(0, 3))).tolist()),
        regret_dtype=dtype,
    )
    state.finished.copy_(draw(0, 4, batch) == 0)
    state.num_out.copy_(torch.minimum(draw(0, 40, batch), state.max_new_tokens.long()))
    state.regret_used.copy_(torch.rand(batch))
    accepted = torch.minimum(draw(0, 65, batch), torch.tensor(slots - 1))
    path = torch.full((batch, slots), -1, dtype=torch.int32)
    kind = torch.full((batch, slots), 255, dtype=torch.uint8)
    for sequence, count in enumerate(accepted.tolist()):
        behind = torch.randperm(slots - 1)[:count].sort().values + 1
        path[sequence, : count + 1] = torch.cat([torch.zeros(1), behind])
        kind[sequence, : count + 1] = draw(0, 3, count + 1)
    lse = torch.rand(batch, slots, dtype=dtype)
    lse[torch.rand(batch, slots) < 0.02] = torch.nan
    return (
        *state.tensors(),
        draw(0, 99, batch).int(),
        draw(0, 30, batch, slots),
        draw(1, 65, batch).int(),
        path,
        accepted.int(),
        draw(0, 30, batch),
        kind,
        torch.rand(batch, dtype=dtype),
        lse,
        torch.rand(batch, slots) if int(draw(0, 2)) else None,
    )


def test_written_by_hand():
    """Three accepted, the second of them ends the sequence; the other sequence is at its limit."""
    state = DecodeState(
        batch_size=2,
        max_new_tokens=6,
        num_slots=5,
        rules=strict_rules(2, [22]),
        regret_dtype=torch.float32,
    )
    for place in (0, 1):
        begin(state, place, 7, 10)
    state.num_out[1] = 4
    kv_len = torch.tensor([30, 40], dtype=torch.int32)
    report = append(
        *state.tensors(),
        kv_len,
        torch.tensor([[10, 21, 99, 22, 23], [10, 31, 32, 33, 34]]),
        torch.tensor([5, 4], dtype=torch.int32),
        torch.tensor([[0, 1, 3, 4, -1], [0, 1, 2, -1, -1]], dtype=torch.int32),
        torch.tensor([3, 2], dtype=torch.int32),
        torch.tensor([50, 60]),
        torch.tensor([[0, 0, 1, 0, 255], [0, 2, 0, 255, 255]], dtype=torch.uint8),
        torch.tensor([0.5, 0.25]),
        torch.zeros(2, 5),
        torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8, 0.9]]),
        HEAD,
        BONUS,
        NO_NAN,
    )
    assert state.out_ids[0, :3].tolist() == [10, 21, 22]
    assert state.out_ids[1, 4:6].tolist() == [31, 32]
    assert state.out_kinds[0, :3].tolist() == [BONUS, 0, 1]
    assert state.out_kinds[1, 4:6].tolist() == [2, 0]
    torch.testing.assert_close(state.out_relevance[0, 1:3], torch.tensor([0.0, 0.1]))
    torch.testing.assert_close(state.out_relevance[1, 4:6], torch.tensor([0.5, 0.6]))
    assert state.num_out.tolist() == [3, 6]
    assert state.last_two.tolist() == [[23, 50], [32, 60]]
    assert state.finished.tolist() == [True, True]
    assert state.regret_used.tolist() == [0.5, 0.25]
    assert kv_len.tolist() == [30, 40], "nothing of them is read again"
    assert [Report.of(row, report.shape[1] - HEAD) for row in report.tolist()] == [
        Report(3, True, NO_NAN, 3, 5, 4, 0.5, [21, 22, 23, 50, 50]),
        Report(6, True, NO_NAN, 2, 4, 3, 0.25, [31, 32, 60, 60, 60]),
    ]


def test_what_the_host_wants_to_know_of_each_token():
    """Along the path: root, slot 2 (loose), slot 3 (exact), and the bonus token of slot 3."""
    state = DecodeState(
        batch_size=1,
        max_new_tokens=9,
        num_slots=4,
        rules=strict_rules(1, [22]),
        regret_dtype=torch.float32,
    )
    begin(state, 0, 7, 1)
    kv_len = torch.tensor([30], dtype=torch.int32)
    tokens = torch.tensor([[1, 2, 3, 4]])
    logits = torch.zeros(1, 4, 6)
    logits[0, 0, [2, 3]] = torch.tensor([4.0, 3.25])
    logits[0, 2, 4], logits[0, 3, 5] = 1.0, 2.0
    shape = DraftShape.chain(3, batch_size=1, device=torch.get_default_device())
    draft = Draft(tokens, shape)
    acceptance = ops.Acceptance(
        torch.tensor([[0, 2, 3, -1]], dtype=torch.int32),
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([5]),
        torch.tensor([[0, 1, 0, 255]], dtype=torch.uint8),
        torch.tensor([0.75]),
    )
    stats = ops.logit_stats(logits, top_k=2)
    costs = regrets(logits, draft, stats, acceptance)
    assert costs.tolist() == [[0, 0.75, 0, 0]]
    relevance = torch.tensor([[0.1, 0.9, 0.5, 0.2]])
    cache = SimpleNamespace(kv_len=kv_len)
    given = (state, cache, draft, acceptance, relevance, stats.lse)
    report = commit(*given, regrets=costs, thresholds=torch.tensor([0.2]))
    (found,) = [Report.of(row, 4) for row in report.tolist()]
    assert found == Report(
        *(4, False, NO_NAN, 2, 4, 3, 0.75, [3, 4, 5, 5]),
        regrets=[0.75, 0, 0, 0],
        anchors=[False, True, True, False],
        threshold=float(torch.tensor(0.2)),
    )
    assert Report.of(commit(*given, regrets=costs)[0].tolist(), 4).anchors == []
    assert Report.of(commit(*given)[0].tolist(), 4).regrets == []


def backends():
    """(name, computes, dtypes) of those that are there beside the reference."""
    if ops.active_backend("cpu") == "cpp":
        call = torch.ops.lvspec.append
        yield (
            "cpp",
            lambda *given: call(*given, HEAD, BONUS, NO_NAN),
            (torch.float32, torch.float64),
        )
    if ops.active_backend("cpu") == "triton":
        call = torch.ops.lvspec.append
        yield "triton", lambda *given: call(*given, HEAD, BONUS, NO_NAN), (torch.float32,)


CASES = [(name, call, dtype) for name, call, dtypes in backends() for dtype in dtypes]


@pytest.mark.skipif(not CASES, reason="the reference computes")
@pytest.mark.parametrize(
    ("call", "dtype"), [case[1:] for case in CASES], ids=[f"{c[0]}-{c[2]}" for c in CASES]
)
def test_in_one_call(call, dtype):
    seen = set()
    for seed in range(300):
        ours, theirs = case(seed, dtype), case(seed, dtype)
        report = call(*ours)
        assert report.equal(append(*theirs, HEAD, BONUS, NO_NAN))
        for index, (mine, wanted) in enumerate(zip(ours, theirs, strict=True)):
            if mine is not None:
                assert torch.equal(mine.nan_to_num(9), wanted.nan_to_num(9)), index
        rows = [Report.of(row, report.shape[1] - HEAD) for row in report.tolist()]
        seen |= {(row.finished, row.nan_row == NO_NAN) for row in rows}
    assert len(seen) == 4, "finished or not, with and without NaN"


def test_the_operation_is_well_behaved():
    torch.library.opcheck(torch.ops.lvspec.append.default, (*case(3), HEAD, BONUS, NO_NAN))
