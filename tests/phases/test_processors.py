"""Logits processors: every one is applied to every row as HF would apply it, or refused.

In float64, where rows of different passes do not differ by enough to change a token.
"""

import itertools

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from lvspec import AcceptancePolicy, DecodeConfig, NonFiniteLogits, generate
from lvspec.phases.logits import LogitsProcessors

COUNT = 24
STRICT = AcceptancePolicy.strict()


@pytest.fixture(scope="module")
def prompts(make_prompt):
    parts = [(3, ("video", 4, 6, 6), 5), (9,), (2, ("image", 4, 8), 4)]
    return [make_prompt(*each, seed=index, dtype=torch.float64) for index, each in enumerate(parts)]


@pytest.fixture(scope="module")
def plain(pair, prompts, hf_greedy):
    """HF's greedy tokens without any processor."""
    return [hf_greedy(pair[0], prompt, COUNT) for prompt in prompts]


class RaiseWhatWasDoubled(LogitsProcessor):
    """A processor of the user's own: words that stood twice in the last five become likelier."""

    def __call__(self, input_ids, scores):
        last = input_ids[:, -5:]
        count = torch.zeros_like(scores).scatter_add_(1, last, torch.ones_like(last).to(scores))
        return scores + 1.5 * (count >= 2)


def suppress_by_length(input_ids, scores):
    """A function is a processor too; this one writes where it reads."""
    scores[:, input_ids.shape[1] % scores.shape[1]] += 4
    return scores


def _list(*processors):
    return LogitsProcessorList(processors)


# What they do is made of the greedy tokens, so that they change something.
CASES = {
    "repetition": lambda words, length: _list(logits_process.RepetitionPenaltyLogitsProcessor(1.4)),
    "ngram": lambda words, length: _list(
        logits_process.RepetitionPenaltyLogitsProcessor(0.7),  # so that they would repeat
        logits_process.NoRepeatNGramLogitsProcessor(2),
    ),
    "min new tokens": lambda words, length: _list(
        logits_process.MinNewTokensLengthLogitsProcessor(length, 7, words[2:5])
    ),
    "suppress": lambda words, length: _list(
        logits_process.SuppressTokensLogitsProcessor(words[1::2])
    ),
    "suppress at begin": lambda words, length: _list(
        logits_process.SuppressTokensAtBeginLogitsProcessor(words[:1], length)
    ),
    "bias": lambda words, length: _list(
        logits_process.SequenceBiasLogitsProcessor({(words[3],): -9.0, tuple(words[6:8]): -9.0})
    ),
    "bad words": lambda words, length: _list(
        logits_process.NoBadWordsLogitsProcessor([[words[2]], words[4:6], words[7:10]])
    ),
    "decay": lambda words, length: _list(
        logits_process.ExponentialDecayLengthPenalty((4, 1.3), words[5], length)
    ),
    "allowed": lambda words, length: _list(
        logits_process.PrefixConstrainedLogitsProcessor(
            lambda batch_id, ids: [(int(ids[-1]) * 7 + k) % 250 for k in range(40)], 1
        )
    ),
    "forced end": lambda words, length: _list(
        logits_process.ForcedEOSTokenLogitsProcessor(length + COUNT - 3, words[2])
    ),
    "watermark": lambda words, length: _list(
        logits_process.WatermarkLogitsProcessor(256, "cpu", greenlist_ratio=0.3, bias=1.5)
    ),
    "of the user": lambda words, length: _list(RaiseWhatWasDoubled(), suppress_by_length),
    "rows and paths": lambda words, length: _list(
        logits_process.TemperatureLogitsWarper(0.5),
        logits_process.RepetitionPenaltyLogitsProcessor(1.2),
        logits_process.SuppressTokensLogitsProcessor(words[2:4]),
        logits_process.NoRepeatNGramLogitsProcessor(3),
        logits_process.TopKLogitsWarper(9),
    ),
}


def _with_hf(model, prompt, processors):
    sequences = model.generate(
        **prompt,
        do_sample=False,
        max_new_tokens=COUNT,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=processors,
    )
    return sequences[0, prompt["input_ids"].shape[1] :].tolist()


def _tokens(pair, prompt, processors, draft=True, policy=STRICT, **config):
    config = DecodeConfig(**{"gamma": 5, "max_new_tokens": COUNT, "eos_ids": (), **config})
    return generate(
        pair[0],
        pair[1] if draft else None,
        prompt,
        policy=policy,
        config=config,
        logits_processor=processors,
    )


@pytest.mark.parametrize("name", CASES)
def test_chain_and_autoregression(pair, prompts, plain, name):
    prompt, make = prompts[0], CASES[name]
    length = prompt["input_ids"].shape[1]
    wanted = _with_hf(pair[0], prompt, make(plain[0], length))
    assert wanted != plain[0]
    for draft in (True, False):
        result = _tokens(pair, prompt, make(plain[0], length), draft)
        assert result.tokens[0].tolist() == wanted


def test_without_any(pair, prompts, plain):
    assert _tokens(pair, prompts[0], None).tokens[0].tolist() == plain[0]


@pytest.mark.parametrize("name", ["repetition", "ngram", "bad words", "rows and paths"])
def test_tree(pair, prompts, plain, name, draft_trees):
    """The right tokens are now in one branch, now in another."""
    prompt, make = prompts[0], CASES[name]
    length = prompt["input_ids"].shape[1]
    wanted = _with_hf(pair[0], prompt, make(plain[0], length))
    words = torch.tensor(wanted + [0] * 8)

    kinds = itertools.cycle([[0, 1, 2, 3, 4], [0, 1, 3, 2, 4], [1, 0, 2, 3, 4]])

    def guess(state):
        at = int(state.num_out[0])
        first, second, third = words[at : at + 3].tolist()
        return torch.tensor([[first, 9, second, 11, third]])[:, next(kinds)]

    draft_trees(guess)
    result = _tokens(pair, prompt, make(plain[0], length), draft=False)
    assert result.tokens[0].tolist() == wanted
    assert set(result.stats.num_accepted) >= {1, 2, 3}


@pytest.mark.parametrize("name", ["repetition", "ngram", "of the user", "rows and paths"])
def test_batch(pair, prompts, plain, name):
    """Prompts of different lengths, each with what stands before its own rows."""
    processors = CASES[name](plain[0], 0)
    results = _tokens(pair, prompts, processors)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.tokens[0].tolist() == _with_hf(pair[0], prompt, processors)


def test_loose_rules_see_the_processed_rows(pair, prompts, plain):
    """A banned word is not accepted loosely either, and regret is what the processed row says."""
    policy = AcceptancePolicy(anchor_threshold=float("inf"), top_k=8)
    free = _tokens(pair, prompts[0], None, policy=policy).tokens[0].tolist()
    banned = sorted(set(free[3:9]))
    processors = _list(logits_process.SuppressTokensLogitsProcessor(banned))
    result = _tokens(pair, prompts[0], processors, policy=policy)
    assert not set(result.tokens[0].tolist()) & set(banned)
    assert result.stats.counts["loose"]
    flat = _tokens(pair, prompts[0], _list(lambda ids, scores: scores * 0), policy=policy)
    assert flat.stats.regret == 0
    assert set(flat.tokens[0].tolist()) <= set(range(8)), "ties go to the lower id"


def test_not_a_number(pair, prompts):
    """What a processor repairs is no error, what it spoils is one."""

    def spoil(input_ids, scores):
        return scores * (
            torch.nan if input_ids.shape[1] > prompts[1]["input_ids"].shape[1] + 6 else 1
        )

    with pytest.raises(NonFiniteLogits) as caught:
        _tokens(pair, prompts[1], _list(spoil))
    assert caught.value.generation.tokens.shape[1] <= 7
    repaired = _tokens(pair, prompts[1], _list(spoil, logits_process.InfNanRemoveLogitsProcessor()))
    assert repaired.tokens.shape[1] == COUNT


def test_the_models_logits_are_left_alone():
    logits, ids = torch.randn(3, 9), torch.tensor([1, 2])
    before = logits.clone()
    processors = LogitsProcessors([suppress_by_length, logits_process.TemperatureLogitsWarper(2.0)])
    changed = processors.rows(logits, [ids, None, ids])
    assert logits.equal(before)
    before[[0, 2], 2] += 4
    assert changed.equal(before / 2), "a row without what stands before it is nobody's"
    assert (
        LogitsProcessors([suppress_by_length]).rows(logits.bfloat16(), [ids] * 3).dtype
        == torch.float32
    )
    assert (
        LogitsProcessors([suppress_by_length]).rows(logits.double(), [ids] * 3).dtype
        == torch.float64
    )


ROW_ONLY = [
    logits_process.TemperatureLogitsWarper(0.7),
    logits_process.TopKLogitsWarper(3),
    logits_process.TopPLogitsWarper(0.6),
    logits_process.MinPLogitsWarper(0.2),
    logits_process.TypicalLogitsWarper(0.7),
    logits_process.EpsilonLogitsWarper(0.1),
    logits_process.EtaLogitsWarper(0.1),
    logits_process.SuppressTokensLogitsProcessor([1, 4]),
    logits_process.InfNanRemoveLogitsProcessor(),
    logits_process.LogitNormalization(),
]


@pytest.mark.parametrize("processor", ROW_ONLY, ids=lambda each: type(each).__name__)
def test_row_only(processor):
    """All rows at once, and what comes out is what each row gives by itself."""
    logits = torch.randn(6, 11) * 2
    found = LogitsProcessors([processor])
    assert not found.need_paths
    alone = torch.cat([processor(torch.tensor([[3, 7]]), row[None].clone()) for row in logits])
    torch.testing.assert_close(found.rows(logits), alone)


class MyTopK(logits_process.TopKLogitsWarper):
    def __call__(self, input_ids, scores):
        self.top_k = 1 + int(input_ids[0, -1]) % 2
        return super().__call__(input_ids, scores)


def test_a_subclass_may_look_at_more():
    found = LogitsProcessors([MyTopK(5)])
    assert found.need_paths
    rows = found.rows(torch.randn(2, 9), [torch.tensor([0, 3]), torch.tensor([0, 4])])
    assert rows.isfinite().sum(-1).tolist() == [2, 1]


def _stateful():
    return [
        logits_process.SynthIDTextWatermarkLogitsProcessor(
            ngram_len=3,
            keys=[1, 2],
            sampling_table_size=16,
            sampling_table_seed=0,
            context_history_size=4,
            device="cpu",
        ),
        logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model=None),
        logits_process.ClassifierFreeGuidanceLogitsProcessor(1.5),
        logits_process.AlternatingCodebooksLogitsProcessor(1, 4, 4),
    ]


@pytest.mark.parametrize("processor", _stateful(), ids=lambda each: type(each).__name__)
def test_refused(pair, prompts, processor):
    message = f"^logits_processor: expected functions .* got {type(processor).__name__}, which"
    with pytest.raises(ValueError, match=message):
        _tokens(pair, prompts[1], _list(processor))


def test_wrong_arguments(pair, prompts):
    with pytest.raises(
        TypeError, match="^logits_processor: expected a list, got RaiseWhat.* alone"
    ):
        _tokens(pair, prompts[1], RaiseWhatWasDoubled())
    with pytest.raises(TypeError, match="^logits_processor: expected callable entries, got int"):
        _tokens(pair, prompts[1], [3])
    with pytest.raises(TypeError, match=r"got function\(input_ids, scores, step\)"):
        _tokens(pair, prompts[1], [lambda input_ids, scores, step: scores])
    constrained = logits_process.PrefixConstrainedLogitsProcessor(lambda *_: [1], 1)
    with pytest.raises(
        ValueError, match="expected no PrefixConstrained.* with 3 prompts at a time"
    ):
        _tokens(pair, prompts, _list(constrained))
