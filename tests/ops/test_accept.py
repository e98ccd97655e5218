"""accept against a second implementation: of all paths keep the right ones, take the best.

The second one is written from the text of the rule and works differently throughout: from the raw
logits of one sequence rather than statistics of a batch, with probabilities rather than their
logarithms, and by declaring which path is right with exact fractions for sums.
"""

import dataclasses
import math
import random
from collections import Counter

import pytest
import torch

from lvspec import ops, reference, tree
from lvspec.policy import PRESETS, AcceptancePolicy
from lvspec.rule import as_float32

# 28,000 cases, or 800 in Triton's interpreter, which takes about 70 ms for one.
INTERPRETED = ops.active_backend("cpu") == "triton"
CASES_PER_BATCH = 8 if INTERPRETED else 40
BATCHES = 100 if INTERPRETED else 700
DTYPES = [
    dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    if dtype in ops.float_dtypes("cpu")
]
WIDEST = torch.float64 if torch.float64 in DTYPES else torch.float32


class Row:
    """What the rule wants to know of one row of logits."""

    def __init__(self, logits):
        cleaned = [-math.inf if math.isnan(x) else x for x in logits]
        self.logits = cleaned
        self.ranking = sorted(range(len(cleaned)), key=lambda token: (-cleaned[token], token))
        self.best = self.ranking[0]
        highest = cleaned[self.best]
        self.regular = math.isfinite(highest) and not any(math.isnan(x) for x in logits)
        self.has_nan = any(math.isnan(x) for x in logits)
        self.tied = cleaned.count(highest) > 1
        if self.regular:
            weights = [math.exp(x - highest) for x in cleaned]
            self.p = [weight / math.fsum(weights) for weight in weights]
            self.entropy = self.entropy_of(range(len(cleaned)))

    def entropy_of(self, tokens):
        return -math.fsum(self.p[i] * math.log(self.p[i]) for i in tokens if self.p[i] > 0)


class Case:
    """One sequence, a policy, and the declarations of section 4 as predicates."""

    def __init__(self, logits, tokens, parents, num_slots, relevance, policy, regret_used):
        self.rows = [Row(row) for row in logits]
        self.token = tokens
        self.parent = parents
        self.relevance = relevance
        self.policy = policy
        self.regret_used = regret_used
        self.paths = [(0,)]
        for slot in range(1, num_slots):
            (above,) = (path for path in self.paths if path[-1] == parents[slot])
            self.paths.append((*above, slot))

    def row(self, t):
        return self.rows[self.parent[t]]

    def wanted(self, t):
        return self.row(t).best

    def exact(self, t):
        return self.token[t] == self.wanted(t)

    def regret(self, t):
        logits, token = self.row(t).logits, self.token[t]
        if not 0 <= token < len(logits):
            return math.inf
        return logits[self.wanted(t)] - logits[token]

    def guarded(self, t):
        guarded = {*self.policy.strict_ids, *self.policy.eos_ids}
        return bool(guarded & {self.token[t], self.wanted(t)})

    def acceptable_at_all(self, t):
        return self.row(t).regular and math.isfinite(self.regret(t)) and not self.guarded(t)

    def anchor(self, t):
        threshold, relevance = self.policy.anchor_threshold, self.relevance[self.parent[t]]
        if threshold == "auto":
            return True  # until a gate has found one
        if self.policy.random_share is not None:
            threshold = self.policy.random_share  # who draws puts it in place of relevance
        return threshold != math.inf and (math.isnan(relevance) or relevance >= threshold)

    def plausible(self, t):
        policy, row, token = self.policy, self.row(t), self.token[t]
        limits = []
        if self.anchor(t):
            limits.append(
                policy.anchor_regret is not None and self.regret(t) <= policy.anchor_regret
            )
        elif policy.max_regret is not None:
            limits.append(self.regret(t) <= policy.max_regret)
        if policy.top_k is not None:
            limits.append(row.ranking.index(token) < policy.top_k)
        if policy.min_prob is not None:
            limits.append(row.p[token] >= policy.min_prob)
        if policy.typical_eps is not None:
            bound = policy.typical_delta * math.exp(-row.entropy)
            limits.append(row.p[token] >= min(policy.typical_eps, bound))
        if policy.min_entropy is not None:
            limits.append(row.entropy_of(row.ranking[: policy.entropy_top]) >= policy.min_entropy)
        return all(limits)

    def loose(self, t):
        return not self.exact(t) and self.acceptable_at_all(t) and self.plausible(t)

    def shiftable(self, t):
        limit = self.policy.shift_regret
        return self.acceptable_at_all(t) and (limit is None or self.regret(t) <= limit)

    def early(self, path, i):
        """Whether the node at index i of the path brings what was wanted a little above it."""
        above = [t for j, t in enumerate(path) if 1 <= j and 1 <= i - j <= self.policy.shift_window]
        lost = {self.wanted(t) for t in above if not self.exact(t)}
        t = path[i]
        return self.shiftable(t) and not self.anchor(t) and self.token[t] in lost

    def late(self, path, i):
        """Whether what the node at index i of the path displaced comes a little below it."""
        below = [t for j, t in enumerate(path) if 1 <= j - i <= self.policy.shift_window]
        return self.shiftable(path[i]) and self.wanted(path[i]) in map(
            self.token.__getitem__, below
        )

    def objections(self, path, i):
        """Why the mismatch at index i of the path does not stand; empty if it does."""
        policy = self.policy
        found = []
        if not (self.loose(path[i]) or self.early(path, i) or self.late(path, i)):
            found.append("resync")
        following = path[i + 1 : i + 1 + policy.window]
        if len(following) < policy.window or not all(map(self.exact, following)):
            found.append("window")
        if policy.max_run is not None:
            before = path[max(1, i - policy.max_run) : i]
            if len(before) == policy.max_run and not any(map(self.exact, before)):
                found.append("run")
        if policy.regret_budget is not None:
            spent = [self.regret(t) for t in path[1 : i + 1] if not self.exact(t)]
            if self.regret_used + math.fsum(spent) > policy.regret_budget + policy.regret_rate * i:
                found.append("budget")
        return found

    def valid(self, path):
        ends = any(self.token[t] in self.policy.eos_ids for t in path[:-1])
        return not ends and not any(self.objections(path, i) for i in self.mismatches(path))

    def candidates(self):
        """Paths that stand and that are no part of a longer one that does."""
        standing = [path for path in self.paths if self.valid(path)]
        return [
            path
            for path in standing
            if not any(path == longer[: len(path)] for longer in standing if longer != path)
        ]

    def lost(self, path):
        return math.fsum(self.regret(path[i]) for i in self.mismatches(path))

    def mismatches(self, path):
        return [i for i in range(1, len(path)) if not self.exact(path[i])]

    def answer(self):
        def score(path):
            return len(path) - self.policy.path_regret * self.lost(path)

        candidates = self.candidates()
        best = max(map(score, candidates))
        equal = [path for path in candidates if score(path) == best]
        least = min(map(self.lost, equal))
        return min((path for path in equal if self.lost(path) == least), key=lambda path: path[-1])

    def kind(self, t):
        return 0 if t == 0 or self.exact(t) else 1 if self.loose(t) else 2

    def count(self, seen, path):
        """Note in `seen` what this case exercised."""
        for other in self.paths:
            if not any(self.token[t] in self.policy.eos_ids for t in other[:-1]):
                for i in self.mismatches(other):
                    seen.update(set(self.objections(other, i)))
        candidates = self.candidates()
        seen["competition"] += len(candidates) > 1
        seen["not the longest"] += len(path) < max(map(len, candidates))
        seen["equal score"] += len({(len(p), self.lost(p)) for p in candidates}) < len(candidates)
        seen["loose at an anchor"] += any(self.kind(t) == 1 and self.anchor(t) for t in path)
        for i in range(1, len(path)):
            t = path[i]
            seen[("exact", "loose", "shift")[self.kind(t)]] += 1
            if self.kind(t) == 2:
                early, late = self.early(path, i), self.late(path, i)
                seen["early only"] += early and not late
                seen["late only"] += late and not early
            seen["loose and shift"] += self.kind(t) == 1 and self.early(path, i)
            seen["end of sequence"] += self.token[t] in self.policy.eos_ids
            seen["tied best"] += self.row(t).tied
            seen["exact in a row with NaN"] += self.row(t).has_nan
            rivals = [s for s in range(1, len(self.paths)) if self.parent[s] == self.parent[t]]
            seen["exact twice"] += self.exact(t) and sum(map(self.exact, rivals)) > 1
            seen["past an exact one"] += not self.exact(t) and any(map(self.exact, rivals))
        for t in (p[-1] for p in self.paths if len(p) > 1 and p[:-1] == path):
            seen["refused, row with NaN"] += self.row(t).has_nan
            seen["refused, infinite row"] += not self.row(t).regular and not self.row(t).has_nan
            seen["refused, guarded"] += self.guarded(t) and not self.exact(t)
            seen["refused, no such token"] += not 0 <= self.token[t] < len(self.rows[0].logits)
            seen["refused, anchor"] += self.anchor(t) and not self.exact(t)


def random_policy(rng, vocabulary):
    """Any fields, most of them off; numbers that logits in steps of 1/2 hit exactly, or never."""

    def maybe(value, chance):
        return value if rng.random() < chance else None

    entropy_top = rng.randint(1, 3)
    eps = maybe(rng.uniform(0.05, 0.5), 0.15)
    return AcceptancePolicy(
        anchor_threshold=rng.choice([-math.inf, 0.5, 1.0, 1.5, math.inf, math.inf, math.inf]),
        anchor_regret=maybe(rng.choice([0.0, 0.5, 1.0]), 0.3),
        max_regret=maybe(rng.choice([0.0, 0.5, 1.0, 2.0]), 0.2),
        top_k=maybe(rng.randint(1, 3), 0.2),
        min_prob=maybe(rng.uniform(0.02, 0.3), 0.15),
        typical_eps=eps,
        typical_delta=None if eps is None else rng.uniform(0.05, 1.0),
        min_entropy=maybe(rng.uniform(0.0, 0.3 * entropy_top), 0.15),
        entropy_top=entropy_top,
        shift_window=rng.choice([0, 0, 1, 2, 3, 4]),
        shift_regret=maybe(rng.choice([0.5, 1.0, 2.0]), 0.4),
        window=rng.choice([0, 0, 0, 1, 2]),
        max_run=maybe(rng.randint(1, 3), 0.4),
        regret_budget=(budget := maybe(rng.choice([0.0, 0.5, 1.0, 2.0, 3.5]), 0.25)),
        regret_rate=0.0 if budget is None else rng.choice([0.0, 0.25, 0.5]),
        path_regret=rng.choice([0.0, 0.5, 1.0, 1.0, 2.0]),
        strict_ids=rng.sample(range(vocabulary), rng.choice([0, 0, 0, 1])),
        eos_ids=rng.sample(range(vocabulary + 2), rng.choice([0, 0, 0, 1, 2])),
    )


def random_row(rng, vocabulary):
    row = [rng.randint(-3, 3) / 2 for _ in range(vocabulary)]
    odd = rng.random()
    if odd < 0.04:
        row[rng.randrange(vocabulary)] = math.nan
    elif odd < 0.05:
        row = [math.nan] * vocabulary
    elif odd < 0.07:
        row[rng.randrange(vocabulary)] = math.inf
    elif odd < 0.08:
        row = [-math.inf] * vocabulary
    elif odd < 0.14:
        row[rng.randrange(vocabulary)] = -math.inf
    return row


def random_sequence(rng, num_slots, vocabulary):
    """Logits, tokens, parents, slots in use, relevance and regret used, as lists and numbers."""
    logits = [random_row(rng, vocabulary) for _ in range(num_slots)]
    chain = rng.random() < 0.4
    bushy = rng.random() < 0.5
    parents, tokens = [-1], [rng.randrange(vocabulary)]
    for t in range(1, num_slots):
        parents.append(t - 1 if chain else rng.randrange(0 if bushy else max(0, t - 3), t))
        kin = [parents[-1], parents[parents[-1]], rng.randrange(num_slots)]
        (source,) = rng.choices([*kin, None], weights=[7, 5, 3, 6])
        if source is None or source < 0:
            anything = rng.random() < 0.15
            tokens.append(rng.randint(-1, vocabulary) if anything else rng.randrange(vocabulary))
        else:
            tokens.append(Row(logits[source]).best)
    in_use = num_slots if rng.random() < 0.7 else rng.randint(1, num_slots)
    relevance = [rng.choice([0.0, 0.25, 0.5, 0.75, 1.0, math.nan]) for _ in range(num_slots)]
    return logits, tokens, parents, in_use, relevance, rng.choice([0.0, 0.0, 0.5, 1.5])


def as_tensors(sequences, dtype):
    logits, tokens, parents, in_use, relevance, used = zip(*sequences)
    return (
        torch.tensor(logits, dtype=dtype),
        torch.tensor(tokens),
        torch.tensor(parents, dtype=torch.int32),
        torch.tensor(in_use, dtype=torch.int32),
        torch.tensor(relevance, dtype=torch.float32),
        torch.tensor(used, dtype=torch.float32),
    )


def compare(sequences, policy, dtype, seen=None, operation=ops.accept):
    logits, tokens, parents, in_use, relevance, used = as_tensors(sequences, dtype)
    stats = reference.logit_stats(logits, top_k=min(3, logits.shape[-1]))
    got = operation(logits, tokens, parents, in_use, stats, relevance, policy, regret_used=used)
    assert got.regret.dtype == stats.lse.dtype
    num_slots = tokens.shape[1]
    rows = zip(sequences, *(field.tolist() for field in got))
    for sequence, path, num_accepted, bonus_id, kind, regret in rows:
        case = Case(*sequence[:5], policy, sequence[5])
        expected = case.answer()
        padding = num_slots - len(expected)
        context = (sequence, policy)
        assert path == list(expected) + [-1] * padding, context
        assert num_accepted == len(expected) - 1, context
        assert bonus_id == case.rows[expected[-1]].best, context
        assert kind == [case.kind(t) for t in expected] + [255] * padding, context
        assert regret == math.fsum(case.regret(expected[i]) for i in case.mismatches(expected))
        if seen is not None:
            case.count(seen, expected)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # minutes in Triton's interpreter, beside other work
def test_equals_brute_force():
    rng = random.Random(1)
    seen = Counter()
    for batch in range(BATCHES):
        vocabulary, num_slots = rng.randint(3, 6), rng.randint(1, 11)
        policy = random_policy(rng, vocabulary)
        sequences = [random_sequence(rng, num_slots, vocabulary) for _ in range(CASES_PER_BATCH)]
        compare(sequences, policy, DTYPES[batch % len(DTYPES)], seen)
    enough = 1 if INTERPRETED else 40
    rare = {what: seen[what] for what in EXERCISED if seen[what] < enough}
    assert not rare, f"the cases hardly exercise {rare}; all: {dict(seen)}"


EXERCISED = (
    "exact", "loose", "shift", "early only", "late only", "loose and shift",
    "resync", "window", "run", "budget", "competition", "not the longest", "equal score",
    "tied best", "exact twice", "past an exact one", "loose at an anchor", "end of sequence",
    "exact in a row with NaN", "refused, row with NaN", "refused, infinite row",
    "refused, guarded", "refused, no such token", "refused, anchor",
)  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_brute_force(name):
    rng = random.Random(2)
    policy = AcceptancePolicy.preset(name, eos_ids=(2,))
    sequences = [random_sequence(rng, 12, 16) for _ in range(20 if INTERPRETED else 100)]
    logits = torch.tensor([sequence[0] for sequence in sequences])
    stats = reference.logit_stats(logits, top_k=16)
    logits, tokens, parents, in_use, relevance, used = as_tensors(sequences, torch.float32)
    got = ops.accept(logits, tokens, parents, in_use, stats, relevance, policy, regret_used=used)
    for sequence, path in zip(sequences, got.path.tolist()):
        expected = list(Case(*sequence[:5], policy, sequence[5]).answer())
        assert path == expected + [-1] * (12 - len(expected))


def test_more_sequences_than_64_are_independent():
    rng = random.Random(3)
    policy = AcceptancePolicy(anchor_threshold=0.5, top_k=3, shift_window=2, regret_budget=2.0)
    sequences = [random_sequence(rng, 7, 5) for _ in range(67 if INTERPRETED else 131)]
    compare(sequences, policy, torch.float32)
    compare(sequences[::-1], policy, torch.float32)


MANY_MISMATCHES = [
    {},
    {"max_run": 1},
    {"max_run": 3, "regret_budget": 6.0},
    {"window": 1},
    {"window": 2, "shift_window": 2, "regret_budget": 20.0},
    {"window": 63},
    {"top_k": 1, "shift_window": 1},
    {"anchor_threshold": -math.inf, "shift_window": 3, "max_run": 2},
    {"anchor_threshold": 0.5, "shift_window": 63, "window": 1},
    {"min_entropy": 0.9, "shift_window": 2, "eos_ids": (3,), "strict_ids": (0,)},
]


@pytest.mark.parametrize("fields", MANY_MISMATCHES, ids=str)
@pytest.mark.parametrize("chain", [True, False])
def test_long_paths_equal_the_reference(fields, chain):
    """Up to 64 slots, most of them mismatches that are tolerated."""
    rng = random.Random(7)
    policy = AcceptancePolicy(**{"anchor_threshold": math.inf, **fields})
    sequences = []
    for num_slots in (64, 33, 32, 5):
        logits = [[rng.randint(-1, 1) / 2 for _ in range(4)] for _ in range(64)]
        tokens, parents = [0], [-1]
        for t in range(1, 64):
            parents.append(t - 1 if chain else max(0, t - rng.randint(1, 3)))
            best = [Row(logits[t]).best, Row(logits[parents[-1]]).best]
            tokens.append(rng.choice([*best, rng.randrange(4)]))
        relevance = [rng.random() for _ in range(64)]
        sequences.append((logits, tokens, parents, num_slots, relevance, rng.choice([0.0, 5.5])))
    logits, tokens, parents, in_use, relevance, used = as_tensors(sequences, torch.float32)
    stats = reference.logit_stats(logits, top_k=3)
    given = (logits, tokens, parents, in_use, stats, relevance, policy)
    got = ops.accept(*given, regret_used=used)
    expected = reference.accept(*given, regret_used=used)
    for x, y in zip(got, expected):
        assert torch.equal(x, y)


@pytest.mark.parametrize("num_slots", [1, 2, 31, 32, 33, 64])
def test_a_sequence_does_not_depend_on_slots_and_batch(num_slots):
    """The same few nodes with more and more padding, in the middle of others."""
    rng = random.Random(8)
    policy = AcceptancePolicy(
        anchor_threshold=0.5, min_entropy=0.3, entropy_top=2, shift_window=2, window=1
    )
    sequences = [random_sequence(rng, 64, 6) for _ in range(9)]
    used_slots = min(num_slots, 11)
    short = [(*s[:3], used_slots, *s[4:]) for s in sequences]
    logits, tokens, parents, in_use, relevance, used = as_tensors(short, torch.float32)
    logits = logits + torch.randn(logits.shape)
    stats = reference.logit_stats(logits, top_k=2)

    def call(batch, slots):
        return ops.accept(
            logits[batch, :slots],
            tokens[batch, :slots],
            parents[batch, :slots],
            in_use[batch],
            reference.LogitStats(*(field[batch, :slots] for field in stats)),
            relevance[batch, :slots],
            policy,
            regret_used=used[batch],
        )

    whole = call(slice(None), num_slots)
    for i in (0, 4):
        alone = call(slice(i, i + 1), used_slots)
        assert torch.equal(whole.path[i, :used_slots], alone.path[0])
        assert torch.equal(whole.kind[i, :used_slots], alone.kind[0])
        assert (whole.path[i, used_slots:] == -1).all()
        assert (whole.kind[i, used_slots:] == 255).all()
        for field in ("num_accepted", "bonus_id", "regret"):
            assert torch.equal(getattr(whole, field)[i : i + 1], getattr(alone, field))


def scattered(tensor):
    """The same values with other strides: every other element of memory full of garbage."""
    shape = [2 * size + 1 for size in reversed(tensor.shape)]
    wide = torch.full(shape, 77, dtype=tensor.dtype).permute(*reversed(range(tensor.dim())))
    view = wide[tuple(slice(1, None, 2) for _ in shape)]
    view.copy_(tensor)
    assert not view.is_contiguous()
    return view


def test_strides_and_float64_inputs():
    rng = random.Random(9)
    policy = AcceptancePolicy(
        anchor_threshold=0.8,
        typical_eps=0.05,
        typical_delta=0.9,
        min_entropy=0.1,
        entropy_top=2,
        top_k=4,
        shift_window=3,
        regret_budget=9.0,
        strict_ids=(5,),
    )
    sequences = [random_sequence(rng, 11, 6) for _ in range(20)]
    logits, tokens, parents, in_use, relevance, used = as_tensors(sequences, torch.bfloat16)
    stats = reference.logit_stats(logits, top_k=4)
    relevance, used = relevance.double(), used.double()
    expected = reference.accept(
        logits, tokens, parents, in_use, stats, relevance, policy, regret_used=used
    )
    assert set(expected.kind.flatten().tolist()) == {0, 1, 2, 255}
    got = ops.accept(
        *map(scattered, (logits, tokens, parents, in_use)),
        reference.LogitStats(*map(scattered, stats)),
        scattered(relevance),
        policy,
        regret_used=scattered(used),
    )
    for x, y in zip(got, expected):
        assert torch.equal(x, y)


def test_regret_used_of_nan_meets_no_budget():
    logits = torch.tensor([[[0.0, -0.5]] * 3])
    tokens = torch.tensor([[0, 1, 0]])
    stats = reference.logit_stats(logits, top_k=1)
    slots = torch.tensor([3], dtype=torch.int32)
    parents = tree.chain_parents(3, batch_size=1)
    used = torch.tensor([math.nan])
    for budget, accepted in ((1e30, 0), (None, 2)):
        policy = AcceptancePolicy(anchor_threshold=math.inf, regret_budget=budget)
        got = ops.accept(logits, tokens, parents, slots, stats, None, policy, regret_used=used)
        assert got.num_accepted.tolist() == [accepted]


def test_every_sequence_has_its_own_rule():
    """A batch of policies is what each of them makes of its sequence."""
    rng = random.Random(10)
    policies = [random_policy(rng, 6) for _ in range(24)]
    policies = [dataclasses.replace(policy, eos_ids=(2, 7)) for policy in policies]
    shifts = AcceptancePolicy(anchor_threshold=math.inf, top_k=1, shift_window=4, eos_ids=(2, 7))
    policies[4:14] = [shifts] * 10
    policies[3] = AcceptancePolicy.strict(strict_ids=(0, 1, 4), eos_ids=(2, 7))
    sequences = [random_sequence(rng, 9, 6) for _ in policies]
    logits, tokens, parents, in_use, relevance, used = as_tensors(sequences, torch.float32)
    stats = reference.logit_stats(logits, top_k=3)
    rules = ops.Rules.of(policies, (2, 7), torch.get_default_device(), num_strict_ids=5)
    call = (logits, tokens, parents, in_use, stats, relevance)
    got = ops.accept(*call, rules, regret_used=used)
    others = ops.accept(*call, ops.Rules(*map(scattered, rules)), regret_used=used)
    assert all(map(torch.equal, got, others))
    kinds = set()
    for i, policy in enumerate(policies):
        one = [x[i : i + 1] for x in (*call[:4], relevance, used)]
        own = reference.LogitStats(*(field[i : i + 1] for field in stats))
        alone = reference.accept(*one[:4], own, one[4], policy, regret_used=one[5])
        assert all(torch.equal(x[i], y[0]) for x, y in zip(got, alone)), (i, policy)
        kinds |= set(alone.kind[0].tolist())
    assert kinds >= {0, 1}


@pytest.mark.parametrize(
    ("path_regret", "one", "two", "expected"),
    [
        (1.6685364246368408, 0.005477000493556261, (0.6048046350479126, 6.8650698e-09), [0, 1, 3]),
        (0.8050107359886169, 0.3005589246749878, (1.5427783727645874, 9.7315693e-09), [0, 2]),
        (1.2105213403701782, 1.1566718816757202, (1.9827622175216675, 1.6013690e-08), [0, 2]),
        (1.11344575881958, 1.5793315172195435, (2.4774444103240967, 7.3928632e-09), [0, 2]),
    ],
)
def test_scores_are_rounded_twice(path_regret, one, two, expected):
    """Two paths as near as float64 can tell: a fused multiply-add would choose otherwise, or find
    them equal, or unequal. One mismatch against two, and their regrets."""
    logits = torch.full((1, 4, 3), -9.0)
    logits[0, 0] = torch.tensor([0.0, -two[0], -one])
    logits[0, 1] = torch.tensor([0.0, -two[1], -9.0])
    stats = reference.logit_stats(logits, top_k=1)
    tokens = torch.tensor([[0, 1, 2, 1]])
    parents = torch.tensor([[-1, 0, 0, 1]], dtype=torch.int32)
    slots = torch.tensor([4], dtype=torch.int32)
    policy = AcceptancePolicy(anchor_threshold=math.inf, path_regret=path_regret)
    got = ops.accept(logits, tokens, parents, slots, stats, None, policy)
    weight, (lost, *rest) = policy.rule.path_regret, map(as_float32, (one, *two))
    is_longer = 2 - weight * sum(rest) > 1 - weight * lost
    assert expected == ([0, 1, 3] if is_longer else [0, 2])
    assert [slot for slot in got.path[0].tolist() if slot >= 0] == expected


@pytest.mark.parametrize("chain", [True, False])
def test_64_slots(chain):
    rng = random.Random(4)
    policy = AcceptancePolicy(anchor_threshold=math.inf, shift_window=3, max_run=2)
    logits = [[rng.randint(-3, 3) / 2 for _ in range(5)] for _ in range(64)]
    tokens, parents = [0], [-1]
    for t in range(1, 64):
        parents.append(t - 1 if chain else max(0, t - 2))
        row = Row(logits[parents[-1]])
        tokens.append(row.best if rng.random() < 0.9 else rng.randrange(5))
    sequence = (logits, tokens, parents, 64, [0.0] * 64, 0.0)
    assert len(Case(*sequence[:5], policy, 0.0).answer()) > 16
    compare([sequence] * 3, policy, WIDEST)


def test_strict_is_the_greedy_prefix():
    logits = torch.randn(67, 9, 11)
    choices = logits.argmax(-1)
    tokens = torch.cat([torch.zeros(67, 1, dtype=torch.int64), choices[:, :-1]], 1)
    wrong = torch.rand(67, 9) < 0.2
    tokens = torch.where(wrong, (tokens + 1) % 11, tokens)
    stats = ops.logit_stats(logits, top_k=1)
    slots = torch.full((67,), 9, dtype=torch.int32)
    parents = tree.chain_parents(9, batch_size=67)
    got = ops.accept(logits, tokens, parents, slots, stats, None, AcceptancePolicy.strict())
    prefix = (~wrong[:, 1:]).int().cumprod(1).sum(1)
    assert torch.equal(got.num_accepted, prefix.int())
    assert torch.equal(got.bonus_id, choices.gather(1, prefix[:, None])[:, 0])
    assert torch.equal(got.regret, torch.zeros(67))


def test_what_stands_past_num_slots_has_no_effect():
    rng = random.Random(5)
    policy = AcceptancePolicy(anchor_threshold=math.inf, top_k=2, shift_window=2, window=1)
    sequences = [random_sequence(rng, 8, 4) for _ in range(20 if INTERPRETED else 50)]
    short = [(*s[:3], rng.randint(1, 6), *s[4:]) for s in sequences]
    tensors = as_tensors(short, torch.float32)
    logits, tokens, parents, in_use, relevance, used = tensors
    padding = torch.arange(8) >= in_use[:, None]
    stats = reference.logit_stats(logits, top_k=3)
    first = ops.accept(logits, tokens, parents, in_use, stats, relevance, policy)
    logits = logits.masked_fill(padding[..., None], math.nan)
    stats = reference.logit_stats(logits, top_k=3)
    tokens = tokens.masked_fill(padding, 2**40)
    parents = parents.masked_fill(padding, 0x55)
    relevance = relevance.masked_fill(padding, math.nan)
    second = ops.accept(logits, tokens, parents, in_use, stats, relevance, policy)
    assert all(map(torch.equal, first, second))


def test_a_draft_with_a_larger_vocabulary():
    """Tokens that only the draft has are refused, whatever the policy allows."""
    anything = AcceptancePolicy(anchor_threshold=math.inf, shift_window=3)
    logits = torch.zeros(1, 4, 5)
    tokens = torch.tensor([[0, 7, 0, 0]])
    stats = ops.logit_stats(logits)
    slots = torch.tensor([4], dtype=torch.int32)
    parents = tree.chain_parents(4, batch_size=1)
    got = ops.accept(logits, tokens, parents, slots, stats, None, anything)
    assert got.num_accepted.tolist() == [0] and got.bonus_id.tolist() == [0]


def test_regret_carries_over():
    """The sum over calls never exceeds the budget, and meets it where it can."""
    policy = AcceptancePolicy(anchor_threshold=math.inf, regret_budget=2.0)
    logits = torch.tensor([[[0.0, -0.5]] * 4])
    tokens = torch.tensor([[0, 1, 1, 1]])
    stats = ops.logit_stats(logits, top_k=1)
    slots = torch.tensor([4], dtype=torch.int32)
    parents = tree.chain_parents(4, batch_size=1)
    used, accepted = torch.zeros(1), []
    for _ in range(3):
        got = ops.accept(logits, tokens, parents, slots, stats, None, policy, regret_used=used)
        used += got.regret
        accepted += got.num_accepted.tolist()
    assert accepted == [3, 1, 0] and used.tolist() == [2.0]


def test_policy_numbers_are_float32():
    """A relevance that equals the threshold as float32 makes an anchor, whatever float64 says."""
    logits = torch.zeros(1, 2, 3)
    tokens = torch.tensor([[0, 1]])
    stats = ops.logit_stats(logits, top_k=1)
    slots = torch.tensor([2], dtype=torch.int32)
    parents = tree.chain_parents(2, batch_size=1)
    threshold = 0.7  # as float32 a little less
    for relevance, accepted in ((0.7, 0), (0.6999, 1)):
        row = torch.tensor([[relevance, 0.0]])
        policy = AcceptancePolicy(anchor_threshold=threshold)
        got = ops.accept(logits, tokens, parents, slots, stats, row, policy)
        assert got.num_accepted.tolist() == [accepted]
