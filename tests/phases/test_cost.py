"""The cost model: what a chain is worth, and the gamma that a run chooses by it."""

import math

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig, DynamicTree, generate
from lvspec.models.model import Model
from lvspec.phases.draft.cost import best_gamma, chain_speedups, expected_tokens, speedup
from lvspec.phases.draft.factory import make_drafter
from lvspec.shapes.pair import load_embedded_pair

STRICT = AcceptancePolicy.strict()


def test_expected_tokens():
    assert expected_tokens(0.5, 2) == 1.75
    assert expected_tokens(0.0, 9) == 1.0
    assert expected_tokens(1.0, 9) == 10.0
    assert expected_tokens(0.3, 0) == 1.0
    for acceptance in (0.2, 0.9):
        closed = (1 - acceptance**8) / (1 - acceptance)
        assert expected_tokens(acceptance, 7) == pytest.approx(closed, rel=1e-12)


def test_expected_tokens_are_those_of_many_chains():
    """Tokens are accepted up to the first that is not, and the bonus token follows."""
    passed = torch.rand(200_000, 6) < 0.7
    tokens = passed.int().cumprod(1).sum(1) + 1.0
    assert float(tokens.mean()) == pytest.approx(expected_tokens(0.7, 6), abs=0.02)


def test_speedup():
    assert speedup(0.5, 2, 0.25) == 1.75 / 1.5
    assert speedup(0.5, 2, 0.25, verify_ratio=1.25) == 1.0
    assert speedup(0.9, 0, 0.3) == 1.0


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("cost_ratio", [0.01, 0.1, 0.44, 1.0])
def test_best_gamma_is_the_best_of_all(acceptance, cost_ratio):
    for most in (1, 5, 63):
        for verify_ratio in (1.0, 1.3):
            every = [speedup(acceptance, g, cost_ratio, verify_ratio) for g in range(1, most + 1)]
            found = best_gamma(acceptance, cost_ratio, most, verify_ratio)
            assert found == 1 + every.index(max(every))


def test_best_gamma():
    assert best_gamma(0.9, 0.1) == 10  # the worked example
    assert best_gamma(1.0, 0.1) == 63
    assert best_gamma(0.0, 0.1) == 1
    assert best_gamma(0.9, 0.0) == 63
    # Dearer drafts and rarer acceptance: shorter chains. A dearer pass of the target: longer.
    assert best_gamma(0.9, 0.44) < best_gamma(0.9, 0.1) < best_gamma(0.9, 0.03)
    assert best_gamma(0.7, 0.1) < best_gamma(0.9, 0.1) < best_gamma(0.9, 0.1, verify_ratio=1.5)


def test_of_several_sequences_on_the_device():
    chances = torch.tensor([[0.5], [0.9]])
    rates = chain_speedups(chances, 0.1, torch.arange(13))
    assert rates.shape == (2, 13) and rates.dtype == torch.float32
    for row, chance in zip(rates, (0.5, 0.9), strict=True):
        wanted = [speedup(chance, gamma, 0.1) for gamma in range(13)]
        torch.testing.assert_close(row, torch.tensor(wanted), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: speedup(1.5, 2, 0.1), "^acceptance: expected a probability, got 1.5"),
        (lambda: speedup(math.nan, 2, 0.1), "^acceptance: expected a probability, got nan"),
        (lambda: speedup(0.5, 64, 0.1), "^gamma: expected 0 to 63, got 64"),
        (lambda: speedup(0.5, -1, 0.1), "^gamma: expected 0 to 63, got -1"),
        (lambda: speedup(0.5, 2, -0.1), "^cost_ratio: expected a number >= 0, got -0.1"),
        (lambda: speedup(0.5, 2, 0.1, 0), "^verify_ratio: expected a number > 0, got 0"),
        (lambda: best_gamma(0.5, 0.1, 0), "^most: expected 1 to 63, got 0"),
        (lambda: expected_tokens(-1, 2), "^acceptance: expected a probability, got -1"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_run_chooses():
    """By the bytes, those of fewer tokens counted, or by the ratio that is given."""
    embedded = load_embedded_pair()
    target, draft = Model(embedded.target, "target"), Model(embedded.draft, "draft")

    def gamma(drafter=draft, **config):
        return make_drafter(target, drafter, DecodeConfig(gamma="auto", **config)).gamma

    ratio = draft.step_bytes / target.step_bytes
    assert 0.1 < ratio < 0.3
    assert gamma() == best_gamma(0.9, ratio) > 4
    assert gamma(acceptance=0.99) == best_gamma(0.99, ratio) > gamma()
    assert gamma(cost_ratio=0.05) == best_gamma(0.9, 0.05) > gamma()
    assert gamma("self", cost_ratio=0.2, acceptance=0.8) == best_gamma(0.8, 0.2)
    assert gamma("self") == 1  # by the bytes of the weights a draft like the target gains nothing
    vocab = tuple(range(10, 20))
    smaller = ratio - 4 * 256 * (256 - 10 - 1) / target.step_bytes  # the end of a sequence is there
    assert gamma(acceptance=0.99, draft_vocab=vocab) == best_gamma(0.99, smaller)
    assert best_gamma(0.99, smaller) > best_gamma(0.99, ratio)


def test_generate_with_it(pair, make_prompt):
    """The run of that gamma, whatever it is."""
    prompt = make_prompt(3, ("video", 4, 6, 6), 5, dtype=torch.float64)
    options = {"max_new_tokens": 30, "eos_ids": ()}
    chosen = DecodeConfig(gamma="auto", cost_ratio=0.2, acceptance=0.8, **options)
    found = generate(*pair, prompt, policy=STRICT, config=chosen)
    fixed = DecodeConfig(gamma=best_gamma(0.8, 0.2), **options)
    wanted = generate(*pair, prompt, policy=STRICT, config=fixed)
    assert found.tokens.equal(wanted.tokens)
    assert found.stats.num_accepted == wanted.stats.num_accepted
    alone = generate(pair[0], None, prompt, config=DecodeConfig(gamma="auto", **options))
    assert alone.tokens.equal(wanted.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": "auto", "tree": "specvlm"}, "^gamma: expected an integer with tree='specvlm'"),
        ({"gamma": "auto", "tree": DynamicTree(2, 2)}, "^gamma: expected an integer with tree=Dyn"),
        ({"gamma": "auto", "adaptive": True}, "^gamma: expected an integer with adaptive=True"),
        ({"gamma": "auto", "draft_ngram": 3}, "^gamma: expected an integer with draft_ngram=3"),
        ({"gamma": "auto", "stop_at_unsure_anchors": 0.5}, "^gamma: .* stop_at_unsure_anchors=0.5"),
        ({"acceptance": 1.0}, r"^acceptance: expected a chance in \(0, 1\), got 1.0"),
        ({"acceptance": 0}, "^acceptance: expected a chance"),
    ],
)
def test_config(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**options)


def test_n_grams_have_no_cost(random_pair, make_prompt):
    with pytest.raises(ValueError, match='^gamma: expected an integer for draft="ngram"'):
        generate(random_pair[0], "ngram", make_prompt(5), config=DecodeConfig(gamma="auto"))
