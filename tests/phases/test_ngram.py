"""NGramDrafter: look-ups against plain Python, on the device alone, and whole generations."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from policies import begin, gated, strict_rules
from torch.utils._python_dispatch import TorchDispatchMode

from lvspec import AcceptancePolicy, DecodeConfig, generate, generate_many
from lvspec.models.model import Model
from lvspec.phases.draft import NGramDrafter
from lvspec.phases.draft.ngram import Sightings, look_up
from lvspec.phases.state import DecodeState

NONE = torch.tensor([], dtype=torch.int64)
STRICT = AcceptancePolicy.strict()


def _look_up(ids, *, ngram_max=3, num_tokens=4, never=NONE):
    """Proposed tokens of one sequence, padded behind it with what would match."""
    padded = torch.tensor([ids + ids[:1] * 5])
    tokens, count = look_up(
        padded, torch.tensor([len(ids)]), ngram_max=ngram_max, num_tokens=num_tokens, never=never
    )
    assert tokens.dtype == torch.int64 and count.dtype == torch.int32
    assert tokens.shape == (1, num_tokens)
    assert (tokens[0, int(count) :] == ids[-1]).all()
    return tokens[0, : int(count)].tolist()


@pytest.mark.parametrize(
    "ids, ngram_max, expected",
    [
        ([7, 8, 1, 7, 8, 2, 9, 7, 8], 2, [2, 9, 7, 8]),
        ([8, 5, 7, 8], 2, [5, 7, 8]),
        ([1, 2, 3, 9, 3, 2, 3], 1, [2, 3]),  # the last token alone: the latest place
        ([1, 2, 3, 9, 3, 2, 3], 2, [9, 3, 2, 3]),  # two tokens go before the latest place
        ([4, 1, 2, 5, 3, 1, 2, 6, 4, 1, 2], 3, [5, 3, 1, 2]),  # three before two
        ([4, 1, 2, 5, 3, 1, 2, 6, 4, 1, 2], 2, [6, 4, 1, 2]),
        ([5, 5, 5, 5], 3, [5]),  # one behind the latest match, which overlaps with the last tokens
        ([1, 2, 3], 3, []),
        ([6], 3, []),
        ([6, 6], 3, [6]),
    ],
)
def test_literals(ids, ngram_max, expected):
    assert _look_up(ids, ngram_max=ngram_max) == expected


def test_ids_that_are_never_proposed():
    ids = [1, 2, 7, 9, 4, 1, 2]
    assert _look_up(ids, never=torch.tensor([9])) == [7]
    assert _look_up(ids, never=torch.tensor([8, 7])) == []
    assert _look_up([9, 9, 3, 9], never=torch.tensor([9])) == [3]


def _in_python(ids, ngram_max, num_tokens, never, least=1):
    for size in range(min(ngram_max, len(ids) - 1), least - 1, -1):
        for end in range(len(ids) - 1, size - 1, -1):  # where the match ends, the latest first
            if ids[end - size : end] == ids[-size:]:
                found = ids[end : end + num_tokens]
                cut = [index for index, token in enumerate(found) if token in never]
                return found[: cut[0]] if cut else found
    return []


@pytest.mark.parametrize("seed", range(40))
def test_as_in_python(seed):
    rng = random.Random(seed)
    batch_size, capacity = rng.randint(1, 5), rng.randint(4, 40)
    ngram_max, num_tokens = rng.randint(1, 5), rng.randint(1, 9)
    never = rng.sample(range(6), rng.randint(0, 2))
    ids = torch.randint(rng.randint(1, 6), (batch_size, capacity))
    length = torch.randint(1, capacity + 1, (batch_size,), dtype=torch.int32)
    least = torch.randint(1, ngram_max + 2, (batch_size,))
    tokens, count = look_up(
        ids,
        length,
        ngram_max=ngram_max,
        num_tokens=num_tokens,
        never=torch.tensor(never, dtype=torch.int64),
        least=least,
    )
    for row in range(batch_size):
        known = ids[row, : length[row]].tolist()
        expected = _in_python(known, ngram_max, num_tokens, never, int(least[row]))
        assert tokens[row, : count[row]].tolist() == expected
        assert (tokens[row, count[row] :] == known[-1]).all()


class NoHostReads(TorchDispatchMode):
    """Fails where the host waits for a number of the device, or a shape depends on one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        for forbidden in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.d"):
            assert forbidden not in name, f"{name} reads from the device"
        return function(*args, **(kwargs or {}))


def test_no_host_reads():
    drafter = NGramDrafter(gamma=4, ngram_max=3, never=(5, 6), device=torch.device("cpu"))
    drafter._may_look = False  # as where there is no CPU to look
    drafter.allocate(batch_size=3, capacity=40)
    state = DecodeState(
        batch_size=3,
        max_new_tokens=10,
        num_slots=5,
        rules=strict_rules(3, []),
        regret_dtype=torch.float32,
    )
    for place, prompt in ((0, [1, 2, 3, 1, 2]), (2, [6, 9, 8, 7, 9])):
        prompt = torch.tensor([prompt])
        drafter.prefill(None, place, prompt=prompt, target_cache=None)
        begin(state, place, int(prompt[0, -1]), 3 if place == 0 else 9)
    drafter._least.fill_(1)
    with pytest.raises(AssertionError, match="reads from the device"), NoHostReads():
        int(state.num_out[0])
    with NoHostReads():
        draft = drafter.propose(state, torch.tensor([5, 0, 5], dtype=torch.int32))
    assert draft.shape.num_slots.dtype == torch.int32
    assert draft.shape.num_slots[[0, 2]].tolist() == [4, 2]
    assert draft.tokens.shape == (3, 5)
    assert draft.tokens[0, :4].tolist() == [3, 1, 2, 3]
    assert draft.tokens[2, :2].tolist() == [9, 9]


def test_what_a_match_needs():
    """A token more behind each draft of which nothing is accepted, one where something is."""
    drafter = NGramDrafter(gamma=2, ngram_max=4, never=(), device=torch.device("cpu"))
    drafter.allocate(batch_size=3, capacity=10)
    for place in range(3):
        drafter.prefill(None, place, prompt=torch.tensor([[8, 9]]), target_cache=None)
    found = [drafter._least.tolist()]
    for num_slots, accepted in (
        ([3, 3, 1], [0, 0, 0]),
        ([3, 2, 1], [0, 1, 0]),
        ([3, 1, 3], [0, 0, 2]),
    ):
        shape = SimpleNamespace(num_slots=torch.tensor(num_slots))
        drafter.commit(
            SimpleNamespace(shape=shape, tokens=torch.zeros(3, 3)),
            SimpleNamespace(num_accepted=torch.tensor(accepted)),
            torch.zeros(3),
        )
        found.append(drafter._least.tolist())
    assert found == [[2, 2, 2], [3, 3, 2], [4, 1, 2], [4, 1, 1]]
    drafter.prefill(None, 0, prompt=torch.tensor([[8, 9]]), target_cache=None)
    assert drafter._least.tolist() == [2, 1, 1], "a new sequence begins anew"


@pytest.mark.parametrize("seed", range(20))
def test_a_sighting_is_missing_only_where_nothing_is_found(seed):
    """Of outputs that grow by several tokens at a time, with another's scratch behind them."""
    rng = random.Random(seed)
    sightings, prompts = Sightings(), [rng.choices(range(9), k=4) for _ in range(2)]
    state = DecodeState(
        batch_size=3,
        max_new_tokens=30,
        num_slots=3,
        rules=strict_rules(3, []),
        regret_dtype=torch.float32,
    )
    state.out_ids.random_(9)
    for place, prompt in enumerate(prompts):
        sightings.begin(place, torch.tensor([prompt]))
        begin(state, place, prompt[-1], rng.randrange(9))
    missing = 0
    for _ in range(12):
        least = torch.tensor([rng.randint(1, 3) for _ in range(3)])
        ids = [
            prompt + state.out_ids[place, : state.num_out[place]].tolist()
            for place, prompt in enumerate(prompts)
        ]
        found = any(_in_python(ids[i], 3, 1, (), int(least[i])) for i in range(2))
        told = sightings.may_match(state, least)
        assert told or not found
        missing += not told
        state.num_out[:2] += torch.tensor([rng.randint(1, 3) for _ in range(2)])
    assert missing > 0


def test_more_room_keeps_the_prompts():
    drafter = NGramDrafter(gamma=2, ngram_max=3, never=(), device=torch.device("cpu"))
    state = DecodeState(
        batch_size=1,
        max_new_tokens=4,
        num_slots=3,
        rules=strict_rules(1, []),
        regret_dtype=torch.float32,
    )
    prompt = torch.tensor([[8, 9, 7]])
    begin(state, 0, 7, 8)
    drafter.allocate(batch_size=1, capacity=10)
    drafter.prefill(None, 0, prompt=prompt, target_cache=None)
    drafter.allocate(batch_size=1, capacity=17)
    drafter._least.fill_(1)
    draft = drafter.propose(state, torch.tensor([3], dtype=torch.int32))
    assert draft.tokens.tolist() == [[8, 9, 7]] and draft.shape.num_slots.tolist() == [3]


@pytest.fixture(scope="module")
def target(random_pair):
    return copy.deepcopy(random_pair[0]).double()


@pytest.fixture(scope="module")
def prompts(make_prompt):
    parts = [(3, ("video", 4, 6, 6), 5), (12,), (2, ("image", 4, 8), 4), (1, ("video", 1, 4, 4), 9)]
    found = [make_prompt(*each, seed=index) for index, each in enumerate(parts)]
    return [
        {name: x.double() if x.is_floating_point() else x for name, x in prompt.items()}
        for prompt in found
    ]


def _config(**config):
    return DecodeConfig(**{"gamma": 5, "max_new_tokens": 40, "eos_ids": (), **config})


@pytest.mark.parametrize("ngram_max", [1, 3])
@pytest.mark.parametrize("index", range(4))
def test_strict_is_greedy(target, prompts, hf_greedy, index, ngram_max):
    prompt = prompts[index]
    config = _config(ngram_max=ngram_max, trace=True)
    found = generate(target, "ngram", prompt, policy=STRICT, config=config)
    assert found.tokens[0].tolist() == hf_greedy(target, prompt, 40)
    sizes = {len(step.drafted) for step in found.trace.steps()}
    assert len(sizes) > 1 or (index, ngram_max) == (3, 3), "drafts are as long as what was found"
    assert found.stats.num_drafted == sum(len(step.drafted) for step in found.trace.steps())
    known = found.sequences[0].tolist()
    before = prompt["input_ids"].shape[1]
    least = min(2, ngram_max)
    for step in found.trace.steps():
        sofar = known[: before + step.position]
        assert step.drafted == _in_python(sofar, ngram_max, 5, (5, 6), least)
        if step.drafted:
            least = 1 if step.path else min(least + 1, ngram_max)


def test_the_default_policy_is_strict(target, prompts, hf_greedy):
    found = generate(target, "ngram", prompts[0], config=_config())
    assert found.tokens[0].tolist() == hf_greedy(target, prompts[0], 40)


def test_something_is_accepted(target, prompts):
    taus = [
        generate(target, "ngram", p, policy=STRICT, config=_config()).stats.tau for p in prompts
    ]
    assert max(taus) > 1.2


def test_a_list_of_prompts_and_places_taken_again(target, prompts):
    policy = gated(0.12)
    config = _config()
    alone = [generate(target, "ngram", p, policy=policy, config=config) for p in prompts]
    together = generate(target, "ngram", prompts, policy=policy, config=config)
    order = [1, 0, 3, 2, 0, 1]
    many = generate_many(
        target, "ngram", [prompts[i] for i in order], batch_size=2, policy=policy, config=config
    )
    pairs = [*zip(together, alone, strict=True)]
    pairs += [*zip(many, (alone[i] for i in order), strict=True)]
    for ours, theirs in pairs:
        assert ours.tokens.equal(theirs.tokens)
        assert ours.stats.num_accepted == theirs.stats.num_accepted
        assert ours.stats.num_drafted == theirs.stats.num_drafted


def _rows(monkeypatch):
    """Slots of every pass of a target from now on."""
    rows, step = [], Model.step

    def counted(self, tokens, *args, **kwargs):
        rows.append(tokens.shape[1])
        return step(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Model, "step", counted)
    return rows


@pytest.mark.parametrize("policy", [STRICT, AcceptancePolicy.lvspec(anchor_threshold=0.12)])
def test_where_nothing_is_found_a_pass_has_one_row(target, prompts, monkeypatch, policy):
    """Of one sequence by itself; of two where neither has a find."""
    config = _config(trace=True)
    rows = _rows(monkeypatch)
    found = [[len(step.drafted) for step in steps(target, p, policy, config)] for p in prompts]
    assert rows == [6 if count else 1 for drafted in found for count in drafted]
    assert {1, 6} == set(rows)
    rows.clear()
    generate(target, "ngram", prompts[:2], policy=policy, config=config)
    assert {1, 6} == set(rows) and rows.count(1) < sum(counts.count(0) for counts in found[:2])


def steps(target, prompt, policy, config):
    return generate(target, "ngram", prompt, policy=policy, config=config).trace.steps()


def test_a_draft_ends_with_its_end_of_sequence():
    drafter = NGramDrafter(gamma=4, ngram_max=3, never=(), device=torch.device("cpu"))
    drafter.allocate(batch_size=2, capacity=40)
    state = DecodeState(
        batch_size=2,
        max_new_tokens=10,
        num_slots=5,
        rules=strict_rules(2, [9, 4]),
        regret_dtype=torch.float32,
    )
    for place, prompt in enumerate(([3, 5, 9, 6, 1, 2], [3, 5, 7, 6, 4, 2])):
        prompt = torch.tensor([prompt])
        drafter.prefill(None, place, prompt=prompt, target_cache=None)
        begin(state, place, int(prompt[0, -1]), 3)
    drafter._least.fill_(1)
    draft = drafter.propose(state, torch.tensor([6, 6], dtype=torch.int32))
    assert draft.tokens.tolist() == [[3, 5, 9, 6, 1], [3, 5, 7, 6, 4]]
    assert draft.shape.num_slots.tolist() == [3, 5]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_new_tokens(target, prompts, hf_greedy, count):
    config = _config(max_new_tokens=count)
    found = generate(target, "ngram", prompts[0], policy=STRICT, config=config)
    assert found.tokens[0].tolist() == hf_greedy(target, prompts[0], count)


def test_end_of_sequence(target, prompts, hf_greedy):
    whole = hf_greedy(target, prompts[0], 40)
    for end in sorted(set(whole))[::3]:
        found = generate(target, "ngram", prompts[0], policy=STRICT, config=_config(eos_ids=(end,)))
        assert found.tokens[0].tolist() == whole[: whole.index(end) + 1]
