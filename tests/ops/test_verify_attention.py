"""verify_attention against one softmax per row, written out."""

import math
import random

import pytest
import torch

from lvspec import ops, reference, tree
from lvspec.kernels.workspace import num_masked_pieces, verify_attention_bytes

DTYPES = ops.float_dtypes("cpu")
WIDEST = torch.float64 if torch.float64 in DTYPES else torch.float32
ROUNDING = 45 * torch.finfo(WIDEST).eps  # 1e-14 in float64: a few sums of numbers around 1

BACKEND = ops.active_backend("cpu")
kernels_only = pytest.mark.skipif(
    BACKEND == "reference", reason="the reference's bits depend on S, as PyTorch's products do"
)

SIZES = [  # B, Hq, Hkv, S, N, D
    (1, 1, 1, 1, 3, 1),
    (2, 6, 2, 5, 37, 9),
    (3, 5, 5, 13, 71, 16),
    (1, 2, 1, 64, 97, 8),
    (67, 1, 1, 2, 11, 5),
]


def random_parents(num_slots):
    return [-1] + [random.randrange(max(0, t - 4), t) for t in range(1, num_slots)]


def problem(batch_size, num_q_heads, num_kv_heads, num_slots, capacity, head_dim, dtype):
    """Random arguments; kv_len ragged, with 0 and the most there is room for among them."""
    q = torch.randn(batch_size, num_q_heads, num_slots, head_dim).to(dtype)
    k_cache = torch.randn(batch_size, num_kv_heads, capacity, head_dim).to(dtype)
    v_cache = torch.randn(batch_size, num_kv_heads, capacity, head_dim).to(dtype)
    kv_len = torch.randint(0, capacity - num_slots + 1, (batch_size,), dtype=torch.int32)
    kv_len[-1] = 0
    kv_len[0] = capacity - num_slots
    parents = torch.tensor([random_parents(num_slots) for _ in range(batch_size)])
    visual = (torch.rand(batch_size, capacity) < 0.4).byte()
    return q, k_cache, v_cache, kv_len, tree.ancestors_from_parents(parents), visual


def eager(q, k_cache, v_cache, kv_len, ancestors, visual):
    """Row by row, in the dtype of the arguments: out, lse, mass, peak."""
    batch_size, num_q_heads, num_slots, head_dim = q.shape
    group = num_q_heads // k_cache.shape[1]
    out = torch.zeros_like(q)
    lse, mass, peak = (q.new_zeros(q.shape[:3]) for _ in range(3))
    for b in range(batch_size):
        for t in range(num_slots):
            length, bits = int(kv_len[b]), int(ancestors[b, t])
            seen = list(range(length)) + [length + j for j in range(num_slots) if bits >> j & 1]
            for h in range(num_q_heads):
                keys, values = k_cache[b, h // group, seen], v_cache[b, h // group, seen]
                logits = (keys @ q[b, h, t]) * head_dim**-0.5
                weights = logits.softmax(0)
                on_video = weights[visual[b, seen] != 0]
                out[b, h, t] = weights @ values
                lse[b, h, t] = logits.logsumexp(0)
                mass[b, h, t] = on_video.sum()
                peak[b, h, t] = on_video.max() if len(on_video) else 0
    return out, lse, mass, peak


def error(got, exact):
    return (got.double() - exact).abs().max().item()


def check_errors(got, peer, exact, q, k_cache):
    """At most twice the error that PyTorch itself makes in this dtype, against float64.

    Where PyTorch is right by luck: a logit x is rounded by x eps, and its weight by as much in
    relation to it. For float64, than which nothing is more exact, a few such roundings.
    """
    group = q.shape[1] // k_cache.shape[1]
    keys = k_cache.double().repeat_interleave(group, 1)
    largest = (q.double() @ keys.transpose(2, 3)).abs().max().item() * q.shape[3] ** -0.5
    rounding = torch.finfo(q.dtype).eps * (1 + largest)
    rounding *= 16 if q.dtype == torch.float64 else 1
    for name, ours, theirs, truth in zip(got._fields, got, peer, exact):
        allowed = 2 * max(error(theirs, truth), rounding * truth.abs().max().item())
        assert error(ours, truth) <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_rows_written_out(sizes, dtype):
    q, k_cache, v_cache, *rest = problem(*sizes, dtype)
    exact = eager(q.double(), k_cache.double(), v_cache.double(), *rest)
    peer = eager(q, k_cache, v_cache, *rest)
    got = ops.verify_attention(q, k_cache, v_cache, *rest)
    assert got.out.dtype == dtype
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert {field.dtype for field in got[1:]} == {statistics}
    check_errors(got, peer, exact, q, k_cache)


@pytest.mark.parametrize("with_plan", [False, True])
def test_memory_behind_the_tree_is_not_read(with_plan):
    q, k_cache, v_cache, kv_len, ancestors, visual = problem(3, 4, 2, 5, 41, 7, torch.float32)
    position = torch.arange(41)
    behind = (position >= kv_len[:, None] + 5)[:, None, :, None]
    visual = visual.masked_fill(position >= kv_len[:, None], 0)
    plan = ops.plan_splits(visual, kv_len, max_piece=6, tail_piece=4) if with_plan else None
    rest = (kv_len, ancestors, visual)
    expected = ops.verify_attention(q, k_cache, v_cache, *rest, plan=plan)
    k_cache, v_cache = (x.masked_fill(behind, math.nan) for x in (k_cache, v_cache))
    got = ops.verify_attention(q, k_cache, v_cache, *rest, plan=plan)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("with_plan", [False, True])
def test_a_row_that_sees_nothing(with_plan):
    q, k_cache, v_cache, _, ancestors, visual = problem(2, 4, 2, 3, 8, 7, torch.float32)
    kv_len = torch.tensor([0, 2], dtype=torch.int32)
    ancestors[:, 1] = 0
    visual = torch.tensor([[0] * 8, [1, 0] + [0] * 6], dtype=torch.uint8)
    plan = ops.plan_splits(visual, kv_len) if with_plan else None
    got = ops.verify_attention(q, k_cache, v_cache, kv_len, ancestors, visual, plan=plan)
    assert (got.out[0, :, 1] == 0).all() and (got.lse[0, :, 1] == -math.inf).all()
    assert (got.visual_mass[0] == 0).all() and (got.visual_peak[0] == 0).all()
    assert not any(field.isnan().any() for field in got)
    # The other sequence has committed tokens, which a row without bits still sees.
    assert (got.visual_mass[1, :, 1] > 0).all()


def test_bit_63():
    """In a chain of 64 the last slot sees all, and the one before it does not see the last."""
    q, k_cache, v_cache, kv_len, _, visual = problem(1, 1, 1, 64, 70, 3, WIDEST)
    ancestors = tree.chain_ancestors(64, batch_size=1)
    assert ancestors[0, 63] == -1
    rest = (kv_len, ancestors, visual)
    first = ops.verify_attention(q, k_cache, v_cache, *rest).out
    v_cache[:, :, int(kv_len[0]) + 63] += 1
    second = ops.verify_attention(q, k_cache, v_cache, *rest).out
    assert torch.equal(first[:, :, :63], second[:, :, :63])
    assert not torch.equal(first[:, :, 63], second[:, :, 63])


def test_siblings_do_not_see_each_other():
    q, k_cache, v_cache, kv_len, _, visual = problem(1, 2, 1, 3, 9, 4, WIDEST)
    ancestors = tree.ancestors_from_parents(torch.tensor([[-1, 0, 0]]))
    whole = ops.verify_attention(q, k_cache, v_cache, kv_len, ancestors, visual)
    # The chain root, slot 2: what slot 2 of the tree stands for.
    kept = [0, 2]
    moved = [*range(int(kv_len[0])), *(int(kv_len[0]) + slot for slot in kept)]
    chain = ops.verify_attention(
        q[:, :, kept],
        k_cache[:, :, moved],
        v_cache[:, :, moved],
        kv_len,
        tree.chain_ancestors(2, batch_size=1),
        visual[:, moved],
    )
    torch.testing.assert_close(whole.out[:, :, kept], chain.out, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("max_piece", "tail_piece"), [(1, 1), (3, 2), (7, 16), (100, 100)], ids=str
)
# The interpreter takes its time.
@pytest.mark.parametrize("sizes", SIZES if BACKEND == "reference" else SIZES[1:2], ids=str)
def test_plan_changes_nothing(sizes, max_piece, tail_piece):
    """Pieces made at prefill; then the sequence has grown, by a different length each."""
    q, k_cache, v_cache, kv_len, ancestors, visual = problem(*sizes, WIDEST)
    prompt_len = (kv_len * torch.rand(len(kv_len))).int()
    visual = visual.masked_fill(torch.arange(sizes[4]) >= prompt_len[:, None], 0)
    plan = ops.plan_splits(visual, prompt_len, max_piece=max_piece, tail_piece=tail_piece)
    rest = (kv_len, ancestors, visual)
    expected = ops.verify_attention(q, k_cache, v_cache, *rest)
    got = ops.verify_attention(q, k_cache, v_cache, *rest, plan=plan)
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=100 * ROUNDING)


def test_plan_pieces_are_of_one_kind():
    visual = (torch.rand(5, 53) < 0.5).byte()
    prompt_len = torch.tensor([0, 1, 20, 52, 53])
    plan = ops.plan_splits(visual, prompt_len, max_piece=4, tail_piece=9)
    for b in range(5):
        position = 0
        for start, end, kind in zip(*(column[b].tolist() for column in plan)):
            if kind == -1:
                assert (start, end) == (0, 0)
                continue
            assert start == position and start < end
            position = end
            if start < prompt_len[b]:
                assert end <= prompt_len[b] and end - start <= 4
                assert (visual[b, start:end] == kind).all()
            else:
                assert kind == 0 and (end - start == 9 or end == 53)
        assert position == 53


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_pieces": 2}, "num_pieces: expected at least 3"),
        ({"max_piece": 0}, "max_piece: expected at least 1"),
        ({"tail_piece": 0}, "tail_piece: expected at least 1"),
        ({"prompt_len": torch.tensor([6])}, "prompt_len: expected 0 to 5"),
        ({"prompt_len": torch.tensor([1, 2])}, r"prompt_len: expected shape \(1,\)"),
        ({"visual": torch.zeros(5)}, r"visual: expected shape \[B, N\]"),
    ],
)
def test_plan_errors(arguments, message):
    visual = torch.tensor([[0, 1, 0, 0, 0]], dtype=torch.uint8)
    arguments = {"visual": visual, "prompt_len": torch.tensor([5])} | arguments
    with pytest.raises(ValueError, match=message):
        ops.plan_splits(**arguments)


def test_pages():
    q, k_cache, v_cache, kv_len, ancestors, visual = problem(3, 4, 2, 5, 42, 7, torch.float32)
    rest = (kv_len, ancestors, visual)
    expected = ops.verify_attention(q, k_cache, v_cache, *rest)
    block_table = torch.randperm(3 * 6).view(3, 6) + 1  # page 0 belongs to nobody
    pages = [torch.full((19, 2, 7, 7), math.nan) for _ in range(2)]
    for page, cache in zip(pages, (k_cache, v_cache)):
        page[block_table] = cache.view(3, 2, 6, 7, 7).transpose(1, 2)
    used = (kv_len + 5 + 6) // 7
    unused = torch.arange(6) >= used[:, None]
    block_table = block_table.masked_fill(unused, -1).int()
    got = ops.verify_attention(q, *pages, *rest, block_table=block_table)
    assert all(map(torch.equal, got, expected))


def test_strided_views():
    q, k_cache, v_cache, *rest = problem(3, 4, 2, 5, 41, 7, torch.float32)
    expected = ops.verify_attention(q, k_cache, v_cache, *rest)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    layers = torch.full((3, 2, 50, 2, 9), math.nan)
    for layer, cache in enumerate((k_cache, v_cache)):
        layers[:, layer, :41, :, :7] = cache.transpose(1, 2)
    k_cache, v_cache = layers[:, :, :41, :, :7].transpose(2, 3).unbind(1)
    got = ops.verify_attention(q, k_cache, v_cache, *rest)
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours, theirs)


def test_a_sequence_does_not_depend_on_the_others():
    q, k_cache, v_cache, *rest = problem(5, 4, 2, 7, 41, 8, torch.float32)
    together = ops.verify_attention(q, k_cache, v_cache, *rest)
    for b in range(5):
        one = slice(b, b + 1)
        alone = ops.verify_attention(q[one], k_cache[one], v_cache[one], *(x[one] for x in rest))
        assert all(torch.equal(x[one], y) for x, y in zip(together, alone))


def test_capacity_reached():
    """There is room for the slots in use but not for the padding behind them."""
    q, k_cache, v_cache, _, ancestors, visual = problem(1, 2, 1, 6, 16, 4, torch.float32)
    kv_len = torch.tensor([13], dtype=torch.int32)
    got = ops.verify_attention(q, k_cache, v_cache, kv_len, ancestors, visual)
    room = [torch.cat([x, torch.zeros(1, 1, 8, 4)], 2) for x in (k_cache, v_cache)]
    visual = torch.cat([visual, torch.zeros(1, 8, dtype=torch.uint8)], 1)
    expected = ops.verify_attention(q, *room, kv_len, ancestors, visual)
    for ours, theirs in zip(got, expected):
        torch.testing.assert_close(ours[:, :, :3], theirs[:, :, :3])
        assert not ours.isnan().any()


def test_scale_and_scores():
    arguments = problem(2, 4, 2, 5, 19, 16, WIDEST)
    default = ops.verify_attention(*arguments)
    assert all(map(torch.equal, default, ops.verify_attention(*arguments, scale=0.25)))
    assert not torch.equal(default.out, ops.verify_attention(*arguments, scale=0.5).out)
    without = ops.verify_attention(*arguments, scores=False)
    assert torch.equal(without.out, default.out) and torch.equal(without.lse, default.lse)
    assert without.visual_mass is None and without.visual_peak is None


def test_any_mark_is_video():
    arguments = problem(2, 4, 2, 5, 19, 16, torch.float32)
    expected = ops.verify_attention(*arguments)
    got = ops.verify_attention(*arguments[:-1], arguments[-1] * 255)
    assert all(map(torch.equal, got, expected))


def in_pages(k_cache, v_cache, page_size):
    """The same caches in shuffled pages of NaN-filled pools, and the table of the pages."""
    batch_size, heads, capacity, head_dim = k_cache.shape
    pages = capacity // page_size
    table = torch.randperm(batch_size * pages).view(batch_size, pages) + 1
    pools = []
    for cache in (k_cache, v_cache):
        pool = torch.full((batch_size * pages + 1, heads, page_size, head_dim), math.nan)
        pool = pool.to(cache.dtype)
        pool[table] = cache.view(batch_size, heads, pages, page_size, head_dim).transpose(1, 2)
        pools.append(pool)
    return (*pools, table.int())


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(head_dim, dtype):
    """Groups of 1 to 9 heads, contiguous or paged, with a plan or without."""
    for index, group in enumerate((1, 7, 9)):
        arguments = problem(1, group, 1, (5, 2, 1)[index], 48, head_dim, dtype)
        q, k_cache, v_cache, kv_len, ancestors, visual = arguments
        visual[:, int(kv_len[0]) :] = 0
        exact = eager(q.double(), k_cache.double(), v_cache.double(), *arguments[3:])
        peer = eager(*arguments)
        plan = ops.plan_splits(visual, kv_len, max_piece=20) if index != 1 else None
        table = None
        if index != 0:
            k_cache, v_cache, table = in_pages(k_cache, v_cache, 6)
        got = ops.verify_attention(
            q, k_cache, v_cache, kv_len, ancestors, visual, plan=plan, block_table=table
        )
        check_errors(got, peer, exact, q, arguments[1])


@pytest.mark.parametrize("with_plan", [False, True])
def test_many_pieces_and_blocks(with_plan):
    """More positions than a piece without a plan has, and blocks that end where a piece does."""
    q, k_cache, v_cache, kv_len, ancestors, visual = problem(2, 2, 1, 3, 1100, 16, WIDEST)
    kv_len = torch.tensor([1088, 512], dtype=torch.int32)
    visual = (torch.arange(1100) < 1000)[None].repeat(2, 1).byte()
    visual[:, :15] = 0
    visual[1, 512:] = 0
    plan = None
    if with_plan:
        prompt_len = torch.tensor([1050, 512])
        plan = ops.plan_splits(visual, prompt_len, max_piece=128, tail_piece=64)
    rest = (kv_len, ancestors, visual)
    exact = eager(q.double(), k_cache.double(), v_cache.double(), *rest)
    got = ops.verify_attention(q, k_cache, v_cache, *rest, plan=plan)
    for ours, truth in zip(got, exact):
        assert error(ours, truth) <= 100 * ROUNDING * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_float8_cache(dtype, paged):
    """The same as with a cache of the numbers that the float8 ones and their factors stand for."""
    q, k_cache, v_cache, *rest = problem(2, 6, 2, 5, 42, 16, torch.float32)
    q = q.to(dtype)
    factors = torch.tensor([0.5, 2.0]), torch.tensor([4.0, 0.25])
    stored = [(cache * 8).to(torch.float8_e4m3fn) for cache in (k_cache, v_cache)]
    meant = [x.double() * factor[:, None, None] for x, factor in zip(stored, factors)]
    exact = eager(q.double(), *meant, *rest)
    peer = eager(q, *(x.to(dtype) for x in meant), *rest)
    table = None
    if paged:
        *stored, table = in_pages(*stored, 7)
    k_scale, v_scale = factors
    got = ops.verify_attention(
        q, *stored, *rest, k_scale=k_scale, v_scale=v_scale, block_table=table
    )
    assert got.out.dtype == dtype
    check_errors(got, peer, exact, q, meant[0])


def test_float8_cache_needs_factors():
    q, k_cache, v_cache, *rest = problem(1, 2, 1, 3, 9, 16, torch.float32)
    stored = [cache.to(torch.float8_e4m3fn) for cache in (k_cache, v_cache)]
    with pytest.raises(ValueError, match="k_scale: expected a factor per KV head, .* got None"):
        ops.verify_attention(q, *stored, *rest)
    with pytest.raises(ValueError, match=r"v_scale: expected shape \(1,\), got \(2,\)"):
        ops.verify_attention(q, *stored, *rest, k_scale=torch.ones(1), v_scale=torch.ones(2))


def splits(plan, sequence, pieces):
    """The plan of one sequence in a table of another width."""
    width = plan.start.shape[1]
    rows = [table[sequence : sequence + 1, : min(width, pieces)] for table in plan]
    padding = max(0, pieces - width)
    return ops.SplitPlan(
        *(torch.nn.functional.pad(x, (0, padding), value=v) for x, v in zip(rows, (0, 0, -1)))
    )


@kernels_only
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("with_plan", [False, True])
def test_bits_do_not_depend_on_batch_plan_width_and_slots(dtype, with_plan):
    """A sequence alone, with a longer plan table, and with fewer slots: equal bit by bit.

    All with row tiles of 16: the interpreter's products round differently for another number of
    rows (on a device within a tile, which `test_bits_on_a_device` holds).
    """
    sizes = (3, 2, 2, 13, 150, 16)
    q, k_cache, v_cache, kv_len, ancestors, visual = problem(*sizes, dtype)
    visual[:, 100:] = 0
    kv_len.clamp_(max=120)
    plan = None
    if with_plan:
        prompt_len = kv_len.clamp(max=100)
        plan = ops.plan_splits(visual, prompt_len, max_piece=37, tail_piece=9)
    together = ops.verify_attention(q, k_cache, v_cache, kv_len, ancestors, visual, plan=plan)
    for b, slots in ((0, 13), (1, 5), (2, 1)):
        one = slice(b, b + 1)
        alone = ops.verify_attention(
            q[one, :, :slots],
            k_cache[one],
            v_cache[one],
            kv_len[one],
            ancestors[one, :slots],
            visual[one],
            plan=splits(plan, b, plan.start.shape[1] + 3) if with_plan else None,
        )
        for name, ours, theirs in zip(together._fields, together, alone):
            assert torch.equal(ours[one, :, :slots], theirs), name


@kernels_only
def test_bits_of_a_row_do_not_depend_on_what_it_does_not_see():
    """Other slots' tokens change, the sequence's later positions too: not a bit of a row does."""
    q, k_cache, v_cache, kv_len, _, visual = problem(1, 4, 2, 6, 90, 16, torch.float32)
    kv_len.fill_(70)
    ancestors = tree.ancestors_from_parents(torch.tensor([[-1, 0, 0, 1, 1, 2]]))
    rest = (kv_len, ancestors, visual)
    first = ops.verify_attention(q, k_cache, v_cache, *rest)
    unseen_by_slot_2 = [1, 3, 4, 5]
    for cache in (k_cache, v_cache):
        cache[:, :, [70 + slot for slot in unseen_by_slot_2]] = 7.0
        cache[:, :, 76:] = math.nan
    second = ops.verify_attention(q, k_cache, v_cache, *rest)
    for ours, theirs in zip(first, second):
        assert torch.equal(ours[:, :, 2], theirs[:, :, 2])


def test_workspace_of_the_caller():
    """Poisoned, of exactly the size asked for; one byte less is refused."""
    q, k_cache, v_cache, *rest = problem(2, 6, 2, 5, 37, 9, torch.float32)
    expected = ops.verify_attention(q, k_cache, v_cache, *rest)
    size = verify_attention_bytes(2, 6, 5, 9, num_pieces=num_masked_pieces(37))
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8)
    got = ops.verify_attention(q, k_cache, v_cache, *rest, workspace=workspace)
    assert all(map(torch.equal, got, expected))
    with pytest.raises(ValueError, match=f"workspace: expected at least {size} bytes"):
        ops.verify_attention(q, k_cache, v_cache, *rest, workspace=workspace[1:])
    with pytest.raises(ValueError, match="workspace: expected contiguous uint8"):
        ops.verify_attention(q, k_cache, v_cache, *rest, workspace=workspace.int())


def test_piece_length():
    """Multiples of 64 within bounds, about 128 pieces over the KV heads."""
    assert ops.piece_length(0, 8) == ops.piece_length(2048, 8) == 128
    assert ops.piece_length(16384, 8) == 1024 and ops.piece_length(32768, 8) == 2048
    assert ops.piece_length(65536, 2) == 1024 and ops.piece_length(10**6, 8) == 4096
    plan = ops.plan_splits(torch.ones(1, 1000, dtype=torch.uint8), torch.tensor([900]))
    assert plan.start[0, :3].tolist() == [0, 128, 256] and plan.start[0, 8:].tolist() == [900]


def test_pieces_far_apart_in_a_plan():
    """Behind more than are merged at once, and than are looked at at once."""
    slots, length, width = 2, 30, 270
    q = torch.randn(1, 2, slots, 16)
    k_cache, v_cache = torch.randn(2, 1, 1, 40, 16).unbind(0)
    visual = (torch.arange(40) // 5 % 2 == 0).to(torch.uint8)[None]
    visual[:, length:] = 0
    plan = ops.SplitPlan(*torch.zeros(3, 1, width, dtype=torch.int32).unbind(0))
    plan.kind.fill_(-1)
    for piece, index in enumerate((3, 62, 63, 130, 260, 265)):
        plan.start[0, index], plan.end[0, index] = 5 * piece, 5 * piece + 5
        plan.kind[0, index] = 1 - piece % 2
    given = (torch.tensor([length], dtype=torch.int32), torch.tensor([[1, 3]]), visual)
    got = ops.verify_attention(q, k_cache, v_cache, *given, plan=plan)
    wide = (x.double() for x in (q, k_cache, v_cache))
    for ours, theirs in zip(got, reference.verify_attention(*wide, *given), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_kv_heads", [2, 4, 8])
def test_a_cache_of_16k_is_merged_in_four_rounds(num_kv_heads):
    """Of a prompt whose video stands between texts."""
    verify_attention = pytest.importorskip("lvspec.kernels.verify_attention")
    visual = torch.zeros(1, 16896, dtype=torch.uint8)
    visual[:, 20:16300] = 1
    plan = ops.plan_splits(visual, torch.tensor([16384]), num_kv_heads=num_kv_heads)
    assert plan.start.shape[1] + 1 <= 4 * verify_attention.MERGE["BLOCK_P"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_plan", [False, True])
def test_bits_on_a_device(dtype, with_plan):
    """Equal within a tile of 16 rows and larger ones, whoever else is there; nearly across both.

    The other tile's sums of D products and of up to 2,517 weights are added in another order, and
    weights are rounded to the dtype before they meet V.
    """
    q, k_cache, v_cache, kv_len, ancestors, visual = (
        x.cuda() for x in problem(2, 40, 8, 17, 3000, 128, dtype)
    )
    visual[:, 2000:] = 0
    kv_len.fill_(2500)
    plan = None
    if with_plan:
        plan = ops.plan_splits(visual.cpu(), torch.tensor([2000, 2000]))
        plan = ops.SplitPlan(*(table.cuda() for table in plan))

    def attend(slots, batch=slice(None)):
        return ops.verify_attention(
            *(q[batch, :, :slots], k_cache[batch], v_cache[batch], kv_len[batch]),
            *(ancestors[batch, :slots], visual[batch]),
            plan=None if plan is None else ops.SplitPlan(*(table[batch] for table in plan)),
        )

    one, three, many = attend(1), attend(3), attend(17)
    first = slice(0, 1)
    for name, small, larger in zip(one._fields, one, three):
        assert torch.equal(larger[:, :, :1], small), name
    for name, together, alone in zip(many._fields, many, attend(17, first)):
        assert torch.equal(together[first], alone), name
    norms = q[:, :, :1].float().norm(dim=-1).max() * k_cache.float().norm(dim=-1).max()
    in_scores = 2 * 128 * torch.finfo(torch.float32).eps * float(norms) / 128**0.5
    rounding = 2 * torch.finfo(dtype).eps + 2 * 2517 * torch.finfo(torch.float32).eps
    bounds = {
        "out": (rounding + 2 * in_scores) * float(v_cache.abs().max()),
        "lse": in_scores + 4 * torch.finfo(torch.float32).eps * float(one.lse.abs().max()),
    }
    for name, small, larger in zip(one._fields, one, many):
        difference = (larger[:, :, :1].float() - small.float()).abs().max()
        # Mass and peak are weights, which a difference in the scores scales.
        assert float(difference) <= bounds.get(name, rounding + 2 * in_scores), name
