"""Drafts that shift words: what they say, and that it is made of what the draft says."""

import math

import pytest
import torch

from lvspec import AcceptancePolicy, DecodeConfig, SkipTree, generate
from lvspec.engine.decoder import make_drafter

ADVERBS = (40, 41, 42)
FIXED = frozenset([12])
WAYS = {"chain": None, "skip tree": SkipTree(3, 9)}
POLICIES = {
    "strict": AcceptancePolicy.strict(),
    "loose": AcceptancePolicy(anchor_threshold=math.inf, top_k=3),
}


@pytest.fixture(scope="module")
def drafts(bench):
    return bench("pairs.shifted_drafts")


@pytest.fixture(scope="module")
def prompts(make_prompt):
    parts = [(3, ("video", 4, 6, 6), 5), (9,)]
    return [make_prompt(*each, seed=index, dtype=torch.float64) for index, each in enumerate(parts)]


@pytest.mark.parametrize(
    "kind, rows, expected",
    [
        ("inserted", {21}, [(10, 0, False), (41, 1, True), (11, 1, False), (12, 2, False)]),
        ("inserted", {20, 21}, [(40, 0, True), (10, 0, False), (11, 1, False), (12, 2, False)]),
        ("left out", {20}, [(11, 0, True), (12, 2, False)]),
        ("left out", {22}, [(10, 0, False), (11, 1, False), (12, 2, False)]),
        ("swapped", {20}, [(11, 0, True), (10, 1, True), (12, 2, False)]),
        ("swapped", {21, 22}, [(10, 0, False), (11, 1, False), (12, 2, False)]),
    ],
)
def test_what_is_said(drafts, monkeypatch, kind, rows, expected):
    """In place of 10, 11 and 12 behind a token at 20; 12 stays where it is."""
    monkeypatch.setattr(drafts.Shifts, "is_changed", lambda self, position, _: position in rows)
    shifts = drafts.Shifts(kind, ADVERBS, FIXED)
    assert shifts.said(1, 20, [10, 11, 12], list(ADVERBS)) == expected


def test_one_row_in_so_many_is_changed(drafts):
    shifts = drafts.Shifts("inserted", ADVERBS, FIXED, every=6)
    changed = [shifts.is_changed(row, token) for row in range(60) for token in range(60)]
    assert sum(changed) / len(changed) == pytest.approx(1 / 6, abs=0.02)
    assert not all(shifts.is_changed(5, token) == changed[300] for token in range(60))


def test_words_of_the_embedded_pair(drafts):
    from lvspec.shapes.pair import load_embedded_pair

    pair = load_embedded_pair()
    shifts = drafts.Shifts.of_embedded(pair, "inserted")
    decode = pair.processor.tokenizer.decode
    assert [decode(id_).strip() for id_ in shifts.adverbs] == list(drafts.ADVERBS)
    fixed = {decode(id_).strip() for id_ in shifts.fixed}
    assert {"red", "left", ".", ","} < fixed and not {"slowly", "the"} & fixed


def _run(drafts, pair, prompts, kind, way, policy, **config):
    shifts = drafts.Shifts(kind, ADVERBS, FIXED, every=4)
    config = DecodeConfig(gamma=4, tree=WAYS[way], eos_ids=(), trace=True, **config)
    with drafts.shifted(shifts):
        generations = generate(*pair, prompts, policy=POLICIES[policy], config=config)
    assert drafts.lvspec.engine.decoder.make_drafter is make_drafter
    return shifts, generations


@pytest.mark.parametrize("kind", ["inserted", "left out", "swapped"])
@pytest.mark.parametrize("way", WAYS)
def test_strict_is_greedy(drafts, pair, prompts, hf_greedy, kind, way):
    _, generations = _run(drafts, pair, prompts, kind, way, "strict", max_new_tokens=20)
    for prompt, generation in zip(prompts, generations, strict=True):
        assert generation.tokens[0].tolist() == hf_greedy(pair[0], prompt, 20)


@pytest.mark.parametrize(
    "kind, way", [("inserted", "chain"), ("left out", "skip tree"), ("swapped", "skip tree")]
)
def test_chains_are_what_the_draft_says_but_for_that(drafts, pair, prompts, hf_rows, kind, way):
    """Behind whatever was committed, changed words among it: by HF's forward of the draft."""
    prompt, options = prompts[0], {"max_new_tokens": 10}
    shifts, (generation,) = _run(drafts, pair, [prompt], kind, way, "loose", **options)
    is_changed, tokens = False, generation.tokens[0].tolist()
    for step in generation.trace.steps():
        known, clean, adverbs = tokens[: step.position], [], []
        while len(clean) < 7:
            row = hf_rows(pair[1], prompt, [*known, *clean])[0][-1]
            clean.append(int(row.argmax()))
            adverbs.append(ADVERBS[int(row[list(ADVERBS)].argmax())])
        said = shifts.said(known[-1], step.position - 1, clean, adverbs)[:4]
        assert step.drafted[:4] == [token for token, _, _ in said]
        is_changed |= any(each for _, _, each in said)
    assert is_changed
