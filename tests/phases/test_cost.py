"""The cost model: what a chain is worth."""

import math

import pytest
import torch

from lvspec.phases.draft.cost import best_gamma, expected_tokens, speedup, text_costs


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
    assert speedup(0.5, 2, 0.25, row_ratio=0.125) == 1.0
    assert speedup(0.9, 0, 0.3, row_ratio=0.5) == 1.0


def test_texts_that_end():
    """By hand: 1 + 2 * 0.25 a pass whole, and a last token that is drafted for one step."""
    assert text_costs(1.0, 4, 10, 0.0, 0.0)[[0, 1, 5, 6, 10]].tolist() == [0, 1, 1, 2, 2]
    assert text_costs(1.0, 9, 10, 0.0, 0.0)[10] == 1
    costs = [0, 1.5, 1.5 + 1.5 / 2, 1.5 + 2.25 / 2 + 1.5 / 4]
    assert text_costs(0.5, 2, 3, 0.25, 0.0).tolist() == costs
    assert text_costs(0.0, 2, 2, 0.25, 0.125).tolist() == [0, 1.75, 3.5]
    assert text_costs(0.0, 2, 2, 0.25, 0.125, piece=1).tolist() == [0, 1.5, 3.25]
    assert text_costs(0.0, 2, 2, 0.25, 0.125, piece=4).tolist() == [0, 1.75, 3.5]


def test_a_long_text_costs_what_tau_says():
    costs = text_costs(0.9, 12, 2000, 0.1, 0.05)
    each = float(costs[2000] - costs[1000]) / 1000
    assert each == pytest.approx(1 / speedup(0.9, 12, 0.1, row_ratio=0.05), rel=1e-6)


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
    assert best_gamma(0.9, 0.06, row_ratio=0.04) == 10  # a row costs as much as a step does
    # Dearer drafts and rarer acceptance: shorter chains. A dearer pass of the target: longer.
    assert best_gamma(0.9, 0.44) < best_gamma(0.9, 0.1) < best_gamma(0.9, 0.03)
    assert best_gamma(0.7, 0.1) < best_gamma(0.9, 0.1) < best_gamma(0.9, 0.1, verify_ratio=1.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: speedup(1.5, 2, 0.1), "^acceptance: expected a probability, got 1.5"),
        (lambda: speedup(math.nan, 2, 0.1), "^acceptance: expected a probability, got nan"),
        (lambda: speedup(0.5, 64, 0.1), "^gamma: expected 0 to 63, got 64"),
        (lambda: speedup(0.5, -1, 0.1), "^gamma: expected 0 to 63, got -1"),
        (lambda: speedup(0.5, 2, -0.1), "^cost_ratio: expected a number >= 0, got -0.1"),
        (lambda: speedup(0.5, 2, 0.1, 0), "^verify_ratio: expected a number > 0, got 0"),
        (lambda: speedup(0.5, 2, 0.1, row_ratio=-1), "^row_ratio: expected a number >= 0, got -1"),
        (lambda: best_gamma(0.5, 0.1, 0), "^most: expected 1 to 63, got 0"),
        (lambda: expected_tokens(-1, 2), "^acceptance: expected a probability, got -1"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
