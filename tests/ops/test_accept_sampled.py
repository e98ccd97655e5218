"""accept_sampled against a second implementation, and against the distribution it has to keep.

Where a uniform lies within rounding of a boundary, float32 may go either way. So the second
implementation says how far from one every decision was, and what is nearer than MARGIN is not
compared; probabilities in float32 err by some 1e-6.
"""

import math
import random

import pytest
import torch

from lvspec import ops, reference
from lvspec.kernels import workspace

INTERPRETED = ops.active_backend("cpu") == "triton"
DTYPES = [dtype for dtype in ops.float_dtypes("cpu") if dtype != torch.float16]
MARGIN = 1e-4
BLOCK = workspace.SAMPLING_BLOCK
NEARLY_ONE = 1 - 2**-24


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


# The worked example of the documentation.
TARGET = [[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 8, 1 / 2], [1 / 8, 1 / 8, 3 / 4]]
DRAFT = [[1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 4, 1 / 4]]


@pytest.mark.parametrize(
    ("sampled", "uniforms", "path", "bonus_id"),
    [
        (True, [0.5, 0.4, 0.5], [0, 1, -1], 2),
        (True, [0.3, 0.4, 0.5], [0, 1, -1], 1),
        (True, [0.5, 0.4, 0.2], [0, 1, 2], 2),
        (True, [0.2, 0.4, 0.2], [0, 1, 2], 1),
        (False, [0.5, 0.4, 0.5], [0, -1, -1], 0),
        (False, [0.7, 0.4, 0.5], [0, -1, -1], 2),
        (False, [0.1, 0.2, 0.1], [0, 1, 2], 0),
    ],
)
def test_literals(sampled, uniforms, path, bonus_id):
    logits = torch.tensor([TARGET]).log()
    draft_logits = torch.tensor([DRAFT]).log() + 3 if sampled else None
    tokens = torch.tensor([[0, 1, 0]])
    for operation in (reference.accept_sampled, ops.accept_sampled):
        got = operation(logits, draft_logits, tokens, int32([3]), torch.tensor([uniforms]))
        assert type(got) is reference.Acceptance
        assert got.path.tolist() == [path] and got.path.dtype == torch.int32
        assert got.num_accepted.tolist() == [2 - path.count(-1)]
        assert got.num_accepted.dtype == torch.int32
        assert got.bonus_id.tolist() == [bonus_id] and got.bonus_id.dtype == torch.int64
        assert got.kind.tolist() == [[0 if slot >= 0 else 255 for slot in path]]
        assert got.kind.dtype == torch.uint8
        assert got.regret.tolist() == [0.0] and got.regret.dtype == torch.float32


class Distribution:
    """Softmax of one row at a temperature."""

    def __init__(self, logits, temperature):
        ranked = [-math.inf if math.isnan(x) else x for x in logits]
        highest = max(ranked)
        self.first_maximum = ranked.index(highest)
        self.regular = math.isfinite(highest) and not any(map(math.isnan, logits))
        if self.regular:
            weights = [math.exp((x - highest) / temperature) for x in logits]
            self.p = [weight / math.fsum(weights) for weight in weights]

    def of(self, token):
        return self.p[token] if 0 <= token < len(self.p) else 0.0


def by_hand(logits, draft_logits, tokens, in_use, uniforms, temperature):
    """(accepted, bonus, distance of the nearest decision from its boundary) of one sequence."""
    margins = [1.0]
    target = [Distribution(row, temperature) for row in logits]
    accepted = 0
    q = None
    for slot in range(1, in_use):
        token = tokens[slot]
        if draft_logits is None:
            q = {token: 1.0}
        else:
            row = Distribution(draft_logits[slot - 1], temperature)
            q = dict(enumerate(row.p)) if row.regular else {}
        if not target[slot - 1].regular or not (draft_logits is None or row.regular):
            break
        offered, wanted = uniforms[slot] * q.get(token, 0.0), target[slot - 1].of(token)
        if offered or wanted:
            margins.append(abs(offered - wanted))
        if offered >= wanted:
            break
        accepted, q = slot, None
    row = target[accepted]
    if not row.regular:
        return accepted, row.first_maximum, min(margins)
    if q is None:
        weights = row.p
    else:
        weights = [max(p - q.get(i, 0.0), 0.0) for i, p in enumerate(row.p)]
        if math.fsum(weights) < MARGIN:
            margins.append(0.0)
            weights = row.p
    total = math.fsum(weights)
    threshold, running, bonus = uniforms[0] * total, 0.0, None
    is_nothing = True  # whether all weights so far are 0, however one rounds
    for i, weight in enumerate(weights):
        running += weight
        is_nothing &= weight == 0 and (row.p[i] == 0 or q.get(i, 0.0) - row.p[i] > MARGIN)
        if not is_nothing and i < len(weights) - 1:
            margins.append(abs(running - threshold) / total)
        if bonus is None and weight and running > threshold:
            bonus = i
    return accepted, bonus, min(margins)


def random_case(rng, num_slots, vocabulary, draft_vocabulary, temperature):
    def row(size):
        values = [rng.choice([rng.gauss(0, 2), rng.randint(-1, 1)]) for _ in range(size)]
        odd = rng.random()
        if odd < 0.03:
            values[rng.randrange(size)] = math.nan
        elif odd < 0.04:
            values = [math.nan] * size
        elif odd < 0.06:
            values[rng.randrange(size)] = math.inf
        elif odd < 0.07:
            values = [-math.inf] * size
        elif odd < 0.3:
            values[rng.randrange(size)] = -math.inf
        return values

    logits = [row(vocabulary) for _ in range(num_slots)]
    draft_logits, tokens = [], [rng.randrange(vocabulary)]
    for slot in range(num_slots - 1):
        values = row(draft_vocabulary)
        if rng.random() < 0.7:  # a draft that resembles the target
            near = [x + rng.gauss(0, 0.3) for x in logits[slot]]
            values = (near + values)[:draft_vocabulary]
        draft_logits.append(values)
        drawn = Distribution(values, temperature)
        if drawn.regular and rng.random() < 0.9:
            tokens.append(rng.choices(range(draft_vocabulary), drawn.p)[0])
        else:
            tokens.append(rng.randint(-1, max(vocabulary, draft_vocabulary)))
    in_use = num_slots if rng.random() < 0.7 else rng.randint(1, num_slots)
    uniforms = [rng.choice([rng.random()] * 6 + [0.0, NEARLY_ONE]) for _ in range(num_slots)]
    uniforms = torch.tensor(uniforms).tolist()  # as float32
    return logits, draft_logits, tokens, in_use, uniforms


def test_equals_the_second_implementation():
    rng = random.Random(1)
    compared, lengths = 0, set()
    batches, batch_size = (16, 8) if INTERPRETED else (300, 20)
    for batch in range(batches):
        num_slots, vocabulary = rng.randint(1, 6), rng.randint(1, 9)
        draft_vocabulary = vocabulary + rng.choice([0, 0, -1, 3])
        draft_vocabulary = max(1, draft_vocabulary)
        temperature = rng.choice([1.0, 1.0, 0.3, 2.5])
        dtype = DTYPES[batch % len(DTYPES)]
        cases = []
        for _ in range(batch_size):
            case = random_case(rng, num_slots, vocabulary, draft_vocabulary, temperature)
            rounded = [torch.tensor(rows).to(dtype).tolist() for rows in case[:2]]
            cases.append((*rounded, *case[2:]))
        logits, draft_logits, tokens, in_use, uniforms = zip(*cases)
        shape = (batch_size, num_slots - 1, draft_vocabulary)
        sampled = batch % 4 != 3
        got = ops.accept_sampled(
            torch.tensor(logits, dtype=dtype),
            torch.tensor(draft_logits, dtype=dtype).view(shape) if sampled else None,
            torch.tensor(tokens),
            int32(in_use),
            torch.tensor(uniforms),
            temperature=temperature,
        )
        for i, case in enumerate(cases):
            length, bonus = got.num_accepted[i].item(), got.bonus_id[i].item()
            assert 0 <= bonus < vocabulary
            assert not case[0][length][bonus] == -math.inf or max(case[0][length]) == -math.inf
            assert got.path[i].tolist() == [t if t <= length else -1 for t in range(num_slots)]
            assert got.kind[i].tolist() == [0 if t <= length else 255 for t in range(num_slots)]
            if not sampled:
                case = (case[0], None, *case[2:])
            accepted, expected, margin = by_hand(*case, temperature)
            if margin > MARGIN:
                compared += 1
                lengths.add(length)
                assert (length, bonus) == (accepted, expected), (case, temperature)
        assert not got.regret.any()
    assert compared > 0.9 * batches * batch_size
    assert lengths >= {0, 1, 2, 3}


def chi_squared_limit(degrees):
    """What chi-squared exceeds with a probability of 1e-5 (Wilson and Hilferty)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 4.265 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize("sampled", [True, False])
def test_the_emitted_tokens_are_distributed_as_the_targets(sampled):
    """As many tokens as slots, of a target whose rows depend on what was emitted before.

    What a call leaves open of them is drawn from the target itself, as the next calls would. A
    right implementation fails this test with a probability of 1e-5.
    """
    vocabulary, temperature = 3, 0.7
    slots, trials = (2, 160) if INTERPRETED else (3, 200_000)
    rows = [torch.rand(vocabulary**depth, vocabulary) for depth in range(slots)]
    draft_rows = [table + torch.randn(table.shape) for table in rows]

    def probabilities(table):
        return (table / temperature).softmax(-1)

    tokens = torch.zeros(trials, slots, dtype=torch.int64)
    history = torch.zeros(trials, dtype=torch.int64)
    logits, draft_logits = [], []
    for depth in range(slots):
        logits.append(rows[depth][history])
        draft_logits.append(draft_rows[depth][history])
        if depth < slots - 1:
            if sampled:
                drawn = probabilities(draft_logits[depth]).multinomial(1)[:, 0]
            else:
                drawn = draft_logits[depth].argmin(-1)
            tokens[:, depth + 1] = drawn
            history = history * vocabulary + drawn
    got = ops.accept_sampled(
        torch.stack(logits, 1),
        torch.stack(draft_logits[:-1], 1) if sampled else None,
        tokens,
        torch.full((trials,), slots, dtype=torch.int32),
        torch.rand(trials, slots),
        temperature=temperature,
    )
    assert len(set(got.num_accepted.tolist())) == slots

    emitted, expected = torch.zeros(trials, dtype=torch.int64), torch.ones(1)
    for depth in range(slots):
        own = probabilities(rows[depth])[emitted].multinomial(1)[:, 0]
        is_drafted, is_bonus = depth < got.num_accepted, depth == got.num_accepted
        drafted = tokens[:, min(depth + 1, slots - 1)]
        token = torch.where(is_drafted, drafted, torch.where(is_bonus, got.bonus_id, own))
        emitted = emitted * vocabulary + token
        expected = (expected[:, None] * probabilities(rows[depth])).flatten()
    expected = expected * trials
    assert expected.min() > 5
    count = torch.bincount(emitted, minlength=len(expected))
    assert ((count - expected) ** 2 / expected).sum() < chi_squared_limit(len(expected) - 1)


def test_a_draft_equal_to_the_target_is_always_accepted():
    logits = torch.randn(7, 4, 5)
    tokens = torch.randint(0, 5, (7, 4))
    uniforms = torch.full((7, 4), NEARLY_ONE)
    got = ops.accept_sampled(logits, logits[:, :3].clone(), tokens, int32([4] * 7), uniforms)
    assert got.num_accepted.tolist() == [3] * 7
    assert got.bonus_id.tolist() == [4] * 7


def test_nothing_of_probability_0_is_emitted():
    """Not even for a uniform of 0, or of 1, which is none."""
    inf = math.inf
    logits = torch.tensor([[[-inf, 0.0, 0.0, -inf], [-inf, -inf, 1.0, -inf]]])
    for draft_logits in (None, torch.zeros(1, 1, 4)):
        for token in (3, 4, -1, 2**40):
            for uniform, bonus in ((0.0, 1), (NEARLY_ONE, 2), (1.0, 2), (math.nan, 2)):
                got = ops.accept_sampled(
                    logits,
                    draft_logits,
                    torch.tensor([[0, token]]),
                    int32([2]),
                    torch.tensor([[uniform, 0.0]]),
                )
                assert got.num_accepted.tolist() == [0] and got.bonus_id.tolist() == [bonus]
    got = ops.accept_sampled(
        logits, None, torch.tensor([[0, 1]]), int32([2]), torch.tensor([[0.0, 0.0]])
    )
    assert got.num_accepted.tolist() == [1] and got.bonus_id.tolist() == [2]


def test_a_token_that_the_draft_cannot_have_drawn():
    """q is 0: accepted where the target's probability is not."""
    logits = torch.zeros(1, 2, 5)
    draft_logits = torch.tensor([[[0.0, -math.inf]]])
    for token, accepted in ((1, 1), (4, 1), (5, 0)):
        got = ops.accept_sampled(
            logits,
            draft_logits,
            torch.tensor([[0, token]]),
            int32([2]),
            torch.tensor([[0.5, NEARLY_ONE]]),
        )
        assert got.num_accepted.tolist() == [accepted]


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("row", "first_maximum"),
    [
        ([1.0, NAN, 3.0, 3.0], 2),
        ([NAN, NAN, NAN, NAN], 0),
        ([0.0, INF, 5.0, INF], 1),
        ([-INF, -INF, -INF, -INF], 0),
        ([-INF, NAN, -INF, -INF], 0),
        ([NAN, -1.0, INF, 2.0], 2),
    ],
)
def test_irregular_rows(row, first_maximum):
    regular = [0.0, -INF, 1.0, -INF]
    tokens, uniforms = torch.tensor([[0, 2, 2]]), torch.tensor([[0.9, 0.0, 0.0]])
    for sampled in (True, False):
        for place in range(3):
            rows = [regular] * 3
            rows[place] = row
            draft_logits = torch.zeros(1, 2, 4) if sampled else None
            got = ops.accept_sampled(
                torch.tensor([rows]), draft_logits, tokens, int32([3]), uniforms
            )
            assert got.num_accepted.tolist() == [place]
            assert got.bonus_id.tolist() == [first_maximum]
    draft_logits = torch.zeros(1, 2, 4)
    draft_logits[0, 1] = torch.tensor(row)
    for uniform, bonus in ((0.2, 0), (0.3, 2)):  # p of `regular` is 0.27 and 0.73
        uniforms[0, 0] = uniform
        got = ops.accept_sampled(
            torch.tensor([[regular] * 3]), draft_logits, tokens, int32([3]), uniforms
        )
        assert got.num_accepted.tolist() == [1] and got.bonus_id.tolist() == [bonus]


def test_irregular_rows_of_more_blocks():
    tokens, uniforms = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[0.9]])
    row = torch.zeros(2 * BLOCK + 3)
    row[[7, BLOCK + 1]] = INF
    got = ops.accept_sampled(row[None, None], None, tokens, int32([1]), uniforms)
    assert got.bonus_id.tolist() == [7]
    row[:BLOCK], row[BLOCK:] = NAN, -INF
    got = ops.accept_sampled(row[None, None], None, tokens, int32([1]), uniforms)
    assert got.bonus_id.tolist() == [0]
    row[-1] = -3.0
    got = ops.accept_sampled(row[None, None], None, tokens, int32([1]), uniforms)
    assert got.bonus_id.tolist() == [2 * BLOCK + 2]


def test_a_residual_of_0_draws_from_the_target():
    """Rejected although p equals q, which takes a uniform of 1."""
    logits = torch.tensor([[[0.0, 1.0, -INF], [5.0, 0.0, 0.0]]])
    uniforms = torch.tensor([[0.1, 1.0], [0.4, 1.0]])
    got = ops.accept_sampled(
        logits.expand(2, 2, 3),
        logits[:, :1].expand(2, 1, 3),
        torch.tensor([[0, 1]] * 2),
        int32([2, 2]),
        uniforms,
    )
    assert got.num_accepted.tolist() == [0, 0] and got.bonus_id.tolist() == [0, 1]


@pytest.mark.parametrize(("temperature", "counts"), [(1e-30, {2}), (1e30, {0, 1, 2, 3})])
def test_extreme_temperatures(temperature, counts):
    logits = torch.tensor([[[0.0, 1.0, 2.0, 1.99]]]).repeat(40, 1, 1)
    uniforms = torch.arange(40)[:, None] / 40
    got = ops.accept_sampled(
        logits,
        None,
        torch.zeros(40, 1, dtype=torch.int64),
        int32([1] * 40),
        uniforms,
        temperature=temperature,
    )
    assert set(got.bonus_id.tolist()) == counts


@pytest.mark.parametrize(("far", "step"), [(5, 1), (65, 6)])
def test_ids_at_the_edges_of_blocks(far, step):
    """Eight ids of equal weight: drawn from p, then from what the draft leaves of it."""
    ids = [0, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 4 * BLOCK, far * BLOCK - 2, far * BLOCK - 1]
    ids.append(far * BLOCK)
    vocabulary = far * BLOCK + 1
    row = torch.full((vocabulary,), -math.inf)
    row[ids] = 2.0

    # The running sum has to exceed the threshold: i / 8 is reached by i ids and exceeded by one
    # more. 1 never is.
    uniforms = torch.tensor([[i / 8, 0.0] for i in range(0, 9, step)])
    count = len(uniforms)
    tokens = torch.zeros(count, 2, dtype=torch.int64)
    got = ops.accept_sampled(row.expand(count, 2, -1), None, tokens, int32([1] * count), uniforms)
    assert got.bonus_id.tolist() == [*ids, ids[-1]][::step]

    tokens[:2, 1] = ids[2]
    left = [*ids[:2], *ids[3:]]
    for draft_vocabulary in (None, vocabulary, 2 * BLOCK, vocabulary + BLOCK)[:: step // 2 or 1]:
        draft_row = None
        if draft_vocabulary is not None:
            draft_row = torch.full((1, 1, draft_vocabulary), -math.inf)
            draft_row[..., ids[2]] = 0.0
            draft_row = draft_row.expand(2, 1, -1)
        for uniform, i in ((6.5 / 7, 6), (3.5 / 7, 3))[::step]:
            got = ops.accept_sampled(
                row.expand(2, 2, -1),
                draft_row,
                tokens[:2],
                int32([2] * 2),
                torch.tensor([[uniform, 0.13], [3 / 8, 0.12]]),  # p of every id is 0.125
            )
            assert got.num_accepted.tolist() == [0, 1]
            assert got.bonus_id.tolist() == [left[i], ids[3]]


def test_blocks_that_differ():
    """Weights far apart, and none in the first block or after it."""
    logits = torch.full((1, 2, 65 * BLOCK), -math.inf)
    logits[0, 0, [BLOCK, 64 * BLOCK]] = 1.0
    logits[0, 1, :2] = torch.tensor([300.0, 301.0])  # weights of 0.27 and 0.73
    tokens = torch.tensor([[0, BLOCK]] * 2)
    uniforms = torch.tensor([[0.2, 0.49], [0.2, 0.51]])
    got = ops.accept_sampled(logits.expand(2, 2, -1), None, tokens, int32([2, 2]), uniforms)
    assert got.num_accepted.tolist() == [1, 0]
    assert got.bonus_id.tolist() == [0, 64 * BLOCK]
    uniforms = torch.tensor([[0.3, 0.49]])
    got = ops.accept_sampled(logits, None, tokens[:1], int32([2]), uniforms)
    assert got.bonus_id.tolist() == [1]


@pytest.mark.parametrize(
    ("vocabulary", "draft_vocabulary"),
    [(BLOCK, BLOCK + 1), (2 * BLOCK + 17, BLOCK - 1), (65 * BLOCK + 3, 65 * BLOCK - 1)],
)
def test_large_vocabularies(vocabulary, draft_vocabulary):
    """Over blocks, up to more than are looked at together."""
    logits = 3 * torch.randn(1, 2, vocabulary)
    draft_logits = 3 * torch.randn(1, 1, draft_vocabulary)
    shared = min(vocabulary, draft_vocabulary)
    draft_logits[..., :shared] = logits[:, :1, :shared] + torch.randn(shared)
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    tokens[:, 1] = draft_logits[:, 0].softmax(-1).multinomial(1)[:, 0]
    for given, uniform in ((draft_logits, NEARLY_ONE), (draft_logits, 0.0), (None, NEARLY_ONE)):
        uniforms = torch.tensor([[torch.rand(1), uniform]])
        got = ops.accept_sampled(logits, given, tokens, int32([2]), uniforms)
        exact = reference.accept_sampled(logits.double(), given, tokens, int32([2]), uniforms)
        assert torch.equal(got.path, exact.path)
        # Rounding moves running sums by some 1e-7 of their total, which is an id of average weight
        # or two.
        assert abs(got.bonus_id - exact.bonus_id) <= 2


def test_only_slots_in_use_count():
    """Garbage past `num_slots` changes nothing; it is brought into 1..S."""
    logits, draft_logits = torch.randn(6, 5, 8), torch.randn(6, 4, 8)
    tokens, uniforms = torch.randint(0, 8, (6, 5)), 0.5 * torch.rand(6, 5)
    in_use = int32([-3, 0, 1, 2, 4, 9])
    first = ops.accept_sampled(logits, draft_logits, tokens, in_use, uniforms)
    used = in_use.clamp(1, 5)
    padding = torch.arange(5) >= used[:, None]
    second = ops.accept_sampled(
        logits.masked_fill(padding[..., None], math.nan),
        draft_logits.masked_fill(padding[:, 1:, None], math.inf),
        tokens.masked_fill(padding, 2**40),
        used,
        uniforms.masked_fill(padding, math.nan),
    )
    assert all(map(torch.equal, first, second))
    assert (first.num_accepted < used).all()


@pytest.mark.parametrize("sampled", [True, False])
def test_a_sequence_does_not_depend_on_slots_and_batch(sampled):
    logits, draft_logits = torch.randn(67, 9, 13), torch.randn(67, 8, 13)
    tokens, uniforms = torch.randint(0, 13, (67, 9)), torch.rand(67, 9)
    uniforms[:, 1:] *= 0.3
    in_use = torch.randint(1, 4, (67,), dtype=torch.int32)

    def call(batch, slots):
        return ops.accept_sampled(
            logits[batch, :slots],
            draft_logits[batch, : slots - 1] if sampled else None,
            tokens[batch, :slots],
            in_use[batch],
            uniforms[batch, :slots],
        )

    whole = call(slice(None), 3)
    wide = call(slice(40, 46), 9)
    for got, batch in ((wide, slice(40, 46)), (call(slice(66, 67), 3), slice(66, 67))):
        assert torch.equal(got.num_accepted, whole.num_accepted[batch])
        assert torch.equal(got.bonus_id, whole.bonus_id[batch])
        assert torch.equal(got.path[:, :3], whole.path[batch])
    assert (wide.path[:, 3:] == -1).all() and (wide.kind[:, 3:] == 255).all()


def test_strides_and_mixed_types():
    logits, draft_logits = torch.randn(11, 5, 3).half().permute(1, 2, 0), torch.randn(5, 2, 22)
    draft_logits = draft_logits[:, :, ::2]
    tokens, uniforms = torch.randint(0, 11, (3, 5)).T, torch.rand(3, 5).T
    in_use = int32([3, 9, 2, 9, 3, 9, 3, 9, 1, 9])[::2]
    given = (logits, draft_logits, tokens, in_use, uniforms)
    assert not any(tensor.is_contiguous() for tensor in given)
    got = ops.accept_sampled(*given)
    expected = reference.accept_sampled(*(tensor.contiguous() for tensor in given))
    assert all(map(torch.equal, got, expected))


def test_workspace():
    """A workspace of the least size gives the same result, whatever it holds."""
    logits, draft_logits = torch.randn(3, 4, 5), torch.randn(3, 3, BLOCK + 1)
    tokens, uniforms = torch.randint(0, 5, (3, 4)), torch.rand(3, 4)
    for given, size in ((draft_logits, BLOCK + 1), (None, 0)):
        arguments = (logits, given, tokens, int32([4, 3, 4]), uniforms)
        least = workspace.accept_sampled_bytes(3, 4, 5, size)
        expected = ops.accept_sampled(*arguments)
        scratch = torch.full((least,), 0xFF, dtype=torch.uint8)  # NaN
        assert all(map(torch.equal, ops.accept_sampled(*arguments, workspace=scratch), expected))
        with pytest.raises(ValueError, match=f"workspace: expected at least {least} bytes"):
            ops.accept_sampled(*arguments, workspace=scratch[1:])


def test_no_sequences():
    empty = torch.empty(0, 3, dtype=torch.int64)
    got = ops.accept_sampled(
        torch.empty(0, 3, 5), torch.empty(0, 2, 5), empty, int32([]), torch.empty(0, 3)
    )
    assert [tuple(field.shape) for field in got] == [(0, 3), (0,), (0,), (0, 3), (0,)]
