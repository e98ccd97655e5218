"""frequent_tokens: which ids captions are made of."""

from types import SimpleNamespace

import pytest
import torch

from lvspec import DecodeConfig, frequent_tokens, generate


def test_the_worked_example():
    assert frequent_tokens([[7, 7, 5], [5, 9]], 2) == (5, 7)


def test_counts_over_captions_of_every_kind():
    captions = [
        SimpleNamespace(tokens=torch.tensor([[4, 4, 4, 2]])),
        torch.tensor([2, 2], dtype=torch.int32),
        torch.tensor([[9, 2], [1, 4]]),
        (9, 1, 1),
        [],
    ]
    # 2: four times, 4: four, 1: three, 9: two
    assert frequent_tokens(captions, 4) == (2, 4, 1, 9)
    assert frequent_tokens(iter(captions), 1) == (2,)
    assert frequent_tokens(captions, 99) == (2, 4, 1, 9)


def test_always():
    assert frequent_tokens([[3, 3, 1]], 1, always=(8, 3, 5)) == (3, 8, 5)


def test_of_generations(random_pair, make_prompt):
    prompt = make_prompt(5)
    results = generate(
        random_pair[0], None, [prompt], config=DecodeConfig(max_new_tokens=30, eos_ids=())
    )
    said = results[0].tokens[0].tolist()
    assert set(frequent_tokens(results, 30)) == set(said)
    best = max(sorted(set(said)), key=said.count)
    assert frequent_tokens(results, 1) == (best,)


@pytest.mark.parametrize(
    ("captions", "count", "error", "message"),
    [
        ([[1]], 0, ValueError, "^count: expected at least 1, got 0"),
        ([[1]], 2.0, TypeError, "^count: expected an integer, got 2.0"),
        ([], 2, ValueError, "^captions: expected some with tokens in them, got none"),
        ([[], []], 2, ValueError, "^captions: expected some with tokens"),
        (["a red ball"], 2, TypeError, "^captions: expected what lvspec.generate .* got str"),
        ([[1.0]], 2, TypeError, "^captions: expected .* got list"),
        ([torch.ones(2)], 2, TypeError, "^captions: expected token ids, got .*float32"),
    ],
)
def test_wrong_arguments(captions, count, error, message):
    with pytest.raises(error, match=message):
        frequent_tokens(captions, count)
