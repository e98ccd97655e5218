"""How long chains are where nobody says it: measured, chosen once, and said."""

import copy
import functools
import gc
import json
import math
from weakref import WeakKeyDictionary

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lvspec import AcceptancePolicy, AnchorTree, DecodeConfig, Decoder, generate, generate_many
from lvspec.engine import length, pace
from lvspec.engine.length import ENOUGH, LENGTHS, ChainLength
from lvspec.engine.pace import ROWS, Pace, measure_pace
from lvspec.engine.stats import DecodeStats, Moment
from lvspec.models.model import Model
from lvspec.phases.draft.chain import PIECE
from lvspec.phases.draft.cost import best_gamma
from lvspec.phases.draft.factory import cost_ratio_of_bytes, draft_source

STRICT, LOOSE = AcceptancePolicy.strict(), AcceptancePolicy.lvspec()


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(length, "_KNOWN", WeakKeyDictionary())


@pytest.fixture
def measured(monkeypatch):
    """(batch size, scores) of every time. A step costs a tenth of a pass, a row half as much."""
    calls = []

    def instead(target, source, *, batch_size, scores, capture):
        calls.append((batch_size, scores))
        return Pace(0.1, 0.95, 0.05)

    monkeypatch.setattr(length, "measure_pace", instead)
    return calls


def chain_length(pair, policy=STRICT, batch_size=1, **config):
    target, draft = (Model(model, role) for model, role in zip(pair, ("target", "draft")))
    return ChainLength(target, draft, policy, DecodeConfig(**config), batch_size=batch_size)


def after(accepted, tested):
    """Statistics of a generation of so many drafted tokens."""
    stats = DecodeStats(torch.device("cpu"), 63)
    for _ in range(tested - accepted):  # one of each chain is not right
        stats.add(0, 2, 0.0)
    stats.add(accepted, accepted + 1, 0.0)
    assert (stats.num_passed, stats.num_tested) == (accepted, tested)
    return stats


def best(chance, step, row, most=63):
    """By the definition, in plain Python."""

    def worth(gamma):
        return sum(chance**n for n in range(gamma + 1)) / (1 + (step + row) * gamma)

    return max((gamma for gamma in LENGTHS if gamma <= most), key=worth)


def best_of_texts(chance, step, row, texts, most=63):
    """By the definition, in plain Python: texts end, and a CPU drafts to their end in pieces."""

    def worth(gamma):
        @functools.cache
        def cost(left):
            if left <= 0:
                return 0
            steps = min(gamma, math.ceil(left / PIECE) * PIECE)
            stands = [chance**n * (1 - chance) for n in range(gamma)] + [chance**gamma]
            rest = sum(p * cost(left - 1 - n) for n, p in enumerate(stands))
            return 1 + row * gamma + step * steps + rest

        return -sum(cost(math.ceil(text * share)) for text in texts for share in length.NEARLY)

    return max((gamma for gamma in LENGTHS if gamma <= most), key=worth)


def test_what_is_measured(random_pair):
    target, draft = (Model(model, "model") for model in random_pair)
    source = draft_source(target, draft, DecodeConfig())
    found = measure_pace(target, source, batch_size=2, scores=True, capture=True)
    assert 0 < found.step < 1 and 0 <= found.base < 1 and 0 < found.row < 1
    assert 0 < found.cost_ratio and 0 < found.row_ratio <= 1
    assert found.cost_ratio == found.step / (found.base + found.row)


def test_a_line_through_both(random_pair, monkeypatch):
    """Of passes of 4 + 2 n seconds, and of a step that takes 3."""
    target, draft = (Model(model, "model") for model in random_pair)
    seconds = [3.0 * pace.PIECE, *(4 + 2 * rows for rows in ROWS)]
    monkeypatch.setattr(pace, "_seconds", lambda *arguments: seconds)
    source = draft_source(target, draft, DecodeConfig())
    found = measure_pace(target, source, batch_size=1, scores=False, capture=True)
    assert (found.step, found.base, found.row) == (3, 4, 2)
    assert (found.cost_ratio, found.row_ratio) == (3 / 6, 2 / 6)


def test_rounds_that_took_least_in_all(monkeypatch):
    """Four calls to warm up, then rounds of 4 + 6, of 1 + 30 (one call's luck), and more."""
    spent = []
    monkeypatch.setattr("time.thread_time", lambda: sum(spent))
    rounds = [(50, 0)] * 4 + [(4, 6), (1, 30), (6, 8), (9, 9), (5, 7)]
    rounds += [(3, 20)] * 7 + [(7, 5)] * 3
    every = [iter(column) for column in zip(*rounds)]
    calls = [lambda times=times: spent.append(next(times)) for times in every]
    found = pace._seconds(calls, torch.device("cpu"), True)
    assert found == [(4 + 5 + 7 * 3) / 5, (6 + 7 + 5 * 3) / 5]


def test_on_a_gpu_a_graph_is_timed(monkeypatch):
    """Each call is run to warm up, captured, and what is replayed is timed."""
    done = []

    class Capturer:
        def __init__(self, device):
            assert device.type == "cuda"

        def capture(self, run):
            return lambda: done.append(("replay", run())), None

    def seconds(call, device):
        call()
        return float(len(done))

    monkeypatch.setattr(pace, "CudaCapturer", Capturer)
    monkeypatch.setattr(pace, "_event_seconds", seconds)
    calls = [lambda: "one", lambda: "other"]
    found = pace._seconds(calls, torch.device("cuda"), True)
    assert done[:4] == [("replay", "one"), ("replay", "other")] * 2
    assert found == [7.0, 8.0], "one after the other, in each of the first five rounds"
    done.clear()
    assert pace._seconds(calls, torch.device("cuda"), False) == [0.0, 0.0] and not done


def test_nothing_to_measure(random_pair):
    """By the bytes: of weights without data, and, with a word, where a pass fails."""
    config = DecodeConfig()
    fakes = [_fake(copy.deepcopy(model)) for model in random_pair]
    for pair in (fakes, [copy.deepcopy(model).to("meta") for model in random_pair]):
        choice = chain_length(pair).choose()
        ratio = cost_ratio_of_bytes(*_source(pair, config))
        assert (choice.by, choice.cost_ratio, choice.row_ratio) == ("bytes", ratio, 0.0)
        assert choice.gamma == best_gamma(length.EXACT, ratio)


def _fake(model):
    mode = FakeTensorMode()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            fake = mode.from_tensor(weight.detach())
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=False))
    return model


def _source(pair, config):
    target, draft = (Model(model, "model") for model in pair)
    return target, draft_source(target, draft, config)


def test_a_pass_that_fails(random_pair, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("out of something")

    monkeypatch.setattr(pace, "_seconds", fails)
    with pytest.warns(RuntimeWarning, match="gamma: expected passes .* out of something"):
        choice = chain_length(random_pair).choose()
    assert choice.by == "bytes"


def test_the_best_by_what_is_measured(random_pair, measured):
    for policy, chance in ((STRICT, length.EXACT), (LOOSE, length.LOOSE)):
        choice = chain_length(random_pair, policy).choose()
        assert choice.gamma == best(chance, 0.1, 0.05)
        assert (choice.by, choice.acceptance_by) == ("measured", "policy")
        assert (choice.cost_ratio, choice.row_ratio) == pytest.approx((0.1, 0.05))
        assert choice.acceptance == chance
    said = chain_length(random_pair, acceptance=0.99).choose()
    assert (said.gamma, said.acceptance_by) == (best(0.99, 0.1, 0.05), "config")
    assert said.gamma > choice.gamma
    for most in (1, 2, 9):  # nothing longer than what is asked for
        found = chain_length(random_pair, acceptance=0.99, max_new_tokens=most).choose().gamma
        assert found == best(0.99, 0.1, 0.05, max(most - 1, 1))


def test_a_cost_that_is_given_is_not_measured(random_pair, measured):
    choice = chain_length(random_pair, cost_ratio=0.2, acceptance=0.85).choose()
    assert choice.to_dict() == {
        "gamma": best_gamma(0.85, 0.2),
        "by": "cost_ratio",
        "cost_ratio": 0.2,
        "row_ratio": 0.0,
        "acceptance": 0.85,
        "acceptance_by": "config",
        "text_length": None,
    }
    assert not measured


def test_chosen_once_and_once_again(random_pair, measured):
    """At first by a guess, then by what was accepted, and then never again."""
    chosen = chain_length(random_pair)
    first = chosen.choose()
    chosen.learn(after(100, ENOUGH - 1))
    assert chosen.choose() is first
    chosen.learn(after(300, 301))
    second = chain_length(random_pair).choose()  # of whoever asks
    chance = (400 + 0.5) / (ENOUGH + 301)
    assert (second.acceptance, second.acceptance_by) == (chance, "generations")
    assert second.gamma == best_of_texts(chance, 0.1, 0.05, [256, 302])
    assert second.text_length == (256 + 302) / 2
    chosen.learn(after(0, 5000))
    assert chosen.choose() is second
    assert chain_length(random_pair, acceptance=0.5).choose().acceptance == 0.5
    other = chain_length(random_pair, LOOSE).choose()
    assert other.acceptance_by == "policy", "nothing was learnt of this one"
    assert measured == [(1, False), (1, True)], "once for each kind of pass"
    chain_length(random_pair, batch_size=3).choose()
    assert measured[2:] == [(3, False)]


def test_texts_that_end(random_pair, measured):
    """Where all is accepted: texts of 41 tokens take two passes of 20 and 20, or one of 40."""
    chosen, text = chain_length(random_pair, LOOSE), DecodeStats(torch.device("cpu"), 63)
    text.add(40, 41, 0.0)
    for _ in range(8):
        chosen.learn(text)
    found = chosen.choose()
    assert (found.acceptance_by, found.text_length) == ("generations", 41)
    assert found.gamma == best_of_texts(320.5 / 321, 0.1, 0.05, [41] * 8)
    assert found.gamma < best(320.5 / 321, 0.1, 0.05) == 63, "the rows behind the end are not free"


def test_what_an_iteration_has_besides(random_pair, measured):
    """Of the run that had least, a second an iteration: as much as a pass over one row."""
    chosen = chain_length(random_pair, LOOSE)
    assert chosen.choose().cost_ratio == pytest.approx(0.1)
    for accept in (3.0, 1.2, 7.0):
        text = DecodeStats(torch.device("cpu"), 63)
        for _ in range(2):
            text.add(60, 64, 0.0)
            for phase, seconds in (("draft", 50), ("accept", accept / 2), ("commit", 0.4)):
                text.timer.add(phase, Moment(9.0, 0.0), Moment(9.0 + seconds, 0.0))
        chosen.learn(text)
    found = chosen.choose()
    assert found.acceptance_by == "generations"
    assert (found.cost_ratio, found.row_ratio) == pytest.approx((0.05, 0.025))
    chance = (360 + 0.5) / (366 + 1)
    assert found.gamma == best_of_texts(chance, 0.05, 0.025, [122] * 3)
    assert found.gamma != best_of_texts(chance, 0.1, 0.05, [122] * 3)


def test_what_is_decoded_strictly_says_nothing_of_a_loose_policy(random_pair, measured):
    chosen, stats = chain_length(random_pair, LOOSE), after(0, 2 * ENOUGH)
    stats.is_gated = stats.is_text = True
    chosen.learn(stats)
    assert chosen.choose().acceptance_by == "policy"
    stats.is_text = False
    chosen.learn(stats)
    assert chosen.choose().acceptance_by == "generations"


def test_nothing_is_known_of_models_that_are_gone(random_pair, measured):
    target, draft = (copy.deepcopy(model) for model in random_pair)
    chain_length((target, draft)).choose()
    assert len(length._KNOWN) == 1
    del target
    gc.collect()
    assert len(length._KNOWN) == 0


def test_a_run_says_what_was_chosen_and_can_be_repeated(random_pair, noisy_draft, make_prompt):
    """Really measured."""
    prompt = make_prompt(3, ("video", 4, 6, 6), 5)
    options = {"max_new_tokens": 30, "eos_ids": ()}
    config = DecodeConfig(**options)
    found = generate(random_pair[0], noisy_draft, prompt, policy=LOOSE, config=config)
    said = json.loads(json.dumps(found.stats.to_dict()))
    assert said["gamma"] == said["gamma_choice"]["gamma"] in LENGTHS
    assert (said["gamma_choice"]["by"], found.stats.gamma_choice["row_ratio"] > 0) == (
        "measured",
        True,
    )
    fixed = DecodeConfig(gamma=said["gamma"], **options)
    again = generate(random_pair[0], noisy_draft, prompt, policy=LOOSE, config=fixed)
    assert again.tokens.equal(found.tokens) and again.stats.gamma_choice is None
    assert again.stats.num_accepted == found.stats.num_accepted


@pytest.mark.parametrize(("batch_size", "gammas"), [(1, (3, 24)), (2, (20, 1))])
def test_its_number_repeats_a_run_whose_caption_depends_on_it(
    pair, make_prompt, measured, monkeypatch, batch_size, gammas
):
    """Under a loose policy, alone and together, and before and after another length is chosen."""
    prompts = [make_prompt(3, ("video", 2, 4, 4), 5, seed=n, dtype=torch.float64) for n in range(3)]
    policy = AcceptancePolicy.relaxed(top_k=16, max_regret=1.0)
    options = {"max_new_tokens": 30, "eos_ids": ()}
    monkeypatch.setattr(length, "ENOUGH", 5)
    said, chosen = [], None
    for gamma in gammas:
        monkeypatch.setattr(length, "LENGTHS", (gamma,))
        chosen = chosen or Decoder(*pair, policy, DecodeConfig(**options), batch_size=batch_size)
        found = list(chosen.generate_many(prompts))
        assert {each.stats.gamma for each in found} == {gamma}
        fixed = DecodeConfig(gamma=found[0].stats.gamma, **options)
        again = generate_many(*pair, prompts, policy=policy, config=fixed, batch_size=batch_size)
        alone = generate(*pair, prompts[-1], policy=policy, config=fixed)
        said.append([each.tokens.tolist() for each in found])
        assert [each.tokens.tolist() for each in again] == said[-1]
        assert alone.tokens.tolist() == said[-1][-1]
    assert said[0] != said[1]


def test_a_seed_repeats_a_caption(random_pair, noisy_draft, make_prompt, monkeypatch):
    """What is measured and learnt differs from run to run: it must not decide what is sampled."""

    def fails(*arguments, **options):
        raise AssertionError("measured")

    monkeypatch.setattr(length, "measure_pace", fails)
    monkeypatch.setattr(length, "ENOUGH", 5)
    config = DecodeConfig(max_new_tokens=30, eos_ids=(), temperature=1.0, seed=3)
    prompt = make_prompt(3, 5)
    found = [generate(random_pair[0], noisy_draft, prompt, config=config) for _ in range(3)]
    for generation in found:
        assert generation.tokens.equal(found[0].tokens)
        choice = generation.stats.gamma_choice
        assert (choice["by"], choice["acceptance_by"]) == ("bytes", "policy")


def test_a_decoder_chooses_when_a_call_begins(random_pair, make_prompt, measured, monkeypatch):
    """Of one call all have the same; what they showed is for the next."""
    target, prompts = random_pair[0], [make_prompt(3, 5, seed=seed) for seed in range(3)]
    monkeypatch.setattr(length, "ENOUGH", 20)
    config = DecodeConfig(max_new_tokens=40, eos_ids=())
    decoder = Decoder(target, copy.deepcopy(target), STRICT, config)  # all is accepted
    calls = [[g.stats for g in decoder.generate_many(prompts)] for _ in range(3)]
    gammas = [{stats.gamma for stats in call} for call in calls]
    learnt = calls[1][0].gamma_choice["acceptance"]
    first = best(length.EXACT, 0.1, 0.05, 39)
    second = best_of_texts(learnt, 0.1, 0.05, [39] * 3, most=39)
    assert gammas == [{first}, {second}, {second}] and first < second
    ways = [{stats.gamma_choice["acceptance_by"] for stats in call} for call in calls]
    assert ways == [{"policy"}, {"generations"}, {"generations"}]
    assert measured == [(1, False)]
    list(generate_many(target, decoder.draft.hf, prompts, batch_size=2, config=config))
    assert measured == [(1, False), (2, True)]


@pytest.mark.parametrize(
    "draft, options, gamma",
    [
        ("model", {"tree": AnchorTree(2, 3)}, 12 + 3),
        ("model", {"tree": "specvlm"}, 25),
        ("model", {"stop_at_unsure_anchors": 0.5}, 12),
        ("model", {"draft_ngram": 2}, 12),
        ("ngram", {}, 12),
        (None, {}, 0),
    ],
)
def test_other_ways_have_a_number(random_pair, make_prompt, measured, draft, options, gamma):
    target, model = random_pair
    config = DecodeConfig(max_new_tokens=6, **options)
    stats = generate(
        target, model if draft == "model" else draft, make_prompt(5), config=config
    ).stats
    assert (stats.gamma, stats.gamma_choice) == (gamma, None)
    assert not measured


def test_the_target_itself(random_pair, make_prompt, measured):
    config = DecodeConfig(max_new_tokens=6, draft_keep=0.5)
    stats = generate(random_pair[0], "self", make_prompt(5), config=config).stats
    assert stats.gamma_choice["by"] == "measured" and len(measured) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acceptance": 1.0}, r"^acceptance: expected a chance in \(0, 1\), got 1.0"),
        ({"acceptance": 0}, "^acceptance: expected a chance"),
        ({"cost_ratio": 0.0}, "^cost_ratio: expected a number > 0, got 0.0"),
        ({"cost_ratio": float("nan")}, "^cost_ratio: expected a number > 0, got nan"),
        ({"gamma": "all"}, "^gamma: expected"),
    ],
)
def test_config(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DecodeConfig(**options)
