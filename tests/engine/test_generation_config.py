"""The target's generation config is applied as HF's `generate` applies it, or left out on request.

In float64, where rows of different passes do not differ by enough to change a token.
"""

import contextlib
import copy
import warnings

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from lvspec import AcceptancePolicy, DecodeConfig, Decoder, DynamicTree, custom_generate, generate

COUNT = 24
STRICT = AcceptancePolicy.strict()


@pytest.fixture(scope="module")
def prompts(make_prompt):
    parts = [(3, ("video", 4, 6, 6), 5), (2, ("image", 4, 8), 4)]
    return [make_prompt(*each, seed=index, dtype=torch.float64) for index, each in enumerate(parts)]


@pytest.fixture(scope="module")
def plain(pair, prompts, hf_greedy):
    return [hf_greedy(pair[0], prompt, COUNT) for prompt in prompts]


@pytest.fixture
def configured(pair):
    """`with configured(repetition_penalty=1.3) as target`: its generation config says so."""

    @contextlib.contextmanager
    def changed(**settings):
        target = pair[0]
        before = target.generation_config
        target.generation_config = copy.deepcopy(before)
        target.generation_config.update(**{"eos_token_id": None, "pad_token_id": 0, **settings})
        try:
            yield target
        finally:
            target.generation_config = before

    return changed


def _hf(target, prompt, **arguments):
    """HF's own tokens, by the model's generation config."""
    arguments = {"do_sample": False, "max_new_tokens": COUNT, **arguments}
    return target.generate(**prompt, **arguments)[0, prompt["input_ids"].shape[1] :].tolist()


def _ours(target, draft, prompt, **config):
    config = DecodeConfig(**{"gamma": 5, "max_new_tokens": COUNT, **config})
    return generate(target, draft, prompt, policy=STRICT, config=config)


# Made of the greedy tokens, so that they change something.
SETTINGS = {
    "repetition": lambda words: {"repetition_penalty": 1.3},
    "ngram": lambda words: {"no_repeat_ngram_size": 2, "repetition_penalty": 0.8},
    "bad words": lambda words: {"bad_words_ids": [[words[2]], words[4:6]]},
    "suppress": lambda words: {"suppress_tokens": words[1::3]},
    "suppress at begin": lambda words: {"begin_suppress_tokens": words[:1]},
    "min new tokens": lambda words: {"eos_token_id": words[2:4], "min_new_tokens": 9},
    "forced end": lambda words: {"forced_eos_token_id": words[3]},
    "bias": lambda words: {"sequence_bias": [[[words[3]], -9.0]]},
    "prompt's words": lambda words: {"encoder_repetition_penalty": 1.5},
    "decay": lambda words: {
        "eos_token_id": [250],  # hardly ever said
        "exponential_decay_length_penalty": (3, 1.6),
    },
    "several": lambda words: {
        "repetition_penalty": 1.2,
        "suppress_tokens": words[2:4],
        "begin_suppress_tokens": words[:2],
        "renormalize_logits": True,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_as_hf(pair, prompts, plain, configured, name):
    settings = SETTINGS[name](plain[0])
    with configured(**settings) as target:
        wanted = _hf(target, prompts[0])
        found = _ours(target, pair[1], prompts[0])
        assert found.tokens[0].tolist() == wanted != plain[0][: len(wanted)]
        applied = {k: v for k, v in settings.items() if k != "eos_token_id"}
        assert found.stats.generation_config == applied
        assert found.to_dict()["stats"]["generation_config"].keys() == applied.keys()


WAYS = {
    "chain": (True, {}),
    "tree": (True, {"tree": DynamicTree(width=2, depth=3)}),
    "n-gram": ("ngram", {"ngram_max": 2}),
    "none": (None, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_repetition_penalty_in_a_batch(pair, prompts, plain, configured, way):
    """Prompts of different lengths, and one that is suppressed at the beginning of each."""
    draft, options = WAYS[way]
    settings = {"repetition_penalty": 1.3, "begin_suppress_tokens": [plain[0][0], plain[1][0]]}
    with configured(**settings) as target:
        wanted = [_hf(target, prompt) for prompt in prompts]
        found = _ours(target, pair[1] if draft is True else draft, prompts, **options)
    assert [each.tokens[0].tolist() for each in found] == wanted
    assert all(mine != without for mine, without in zip(wanted, plain, strict=True))
    assert all(each.stats.generation_config == settings for each in found)


def test_left_out_on_request(pair, prompts, plain, configured):
    with configured(repetition_penalty=1.3, min_new_tokens=3, num_beams=3) as target:
        found = _ours(target, pair[1], prompts[0], generation_config=False)
    assert found.tokens[0].tolist() == plain[0]
    assert found.stats.generation_config == {}
    with pytest.raises(TypeError, match="^generation_config: expected True or False .*, got {}"):
        DecodeConfig(generation_config={})


def test_sampling_of_the_generation_config_is_not_applied(pair, prompts, plain, configured):
    """Qwen2-VL's says `do_sample`, `top_k=1`: that is asked for by a temperature, and only here."""
    with configured(do_sample=True, top_k=1, top_p=0.001, temperature=0.01, min_p=0.9) as target:
        assert _ours(target, pair[1], prompts[0]).tokens[0].tolist() == plain[0]
        config = {"temperature": 1.0, "seed": 1}
        sampled = _ours(target, pair[1], prompts[0], **config)
        assert sampled.tokens[0].tolist() != plain[0]
        assert sampled.stats.generation_config == {}
    assert _ours(*pair, prompts[0], **config).tokens.equal(sampled.tokens)


def test_order_of_hf_with_sampling(pair, prompts, plain, configured):
    """Suppressed before top-k, normalised behind it: only what HF leaves is drawn."""
    words = sorted(set(plain[0]))
    with configured(suppress_tokens=words, renormalize_logits=True) as target:
        config = {"temperature": 0.7, "top_k": 1, "seed": 3}
        found = _ours(target, pair[1], prompts[0], **config).tokens[0].tolist()
        assert found == _hf(target, prompts[0])


def test_ends_of_the_run_not_of_the_generation_config(pair, prompts, plain, configured):
    """`min_new_tokens` is about the ids that end this run."""
    words = plain[0]
    with configured(min_new_tokens=9) as target:
        found = _ours(target, pair[1], prompts[0], eos_ids=(words[3],)).tokens[0].tolist()
        assert found == _hf(target, prompts[0], eos_token_id=words[3])
    assert len(found) > 9


def test_processors_of_the_user_take_the_place(pair, prompts, plain, configured):
    given = LogitsProcessorList(
        [
            logits_process.RepetitionPenaltyLogitsProcessor(1.6),
            logits_process.SuppressTokensLogitsProcessor(plain[0][3:5]),
        ]
    )
    with configured(repetition_penalty=1.1, no_repeat_ngram_size=3) as target:
        wanted = _hf(target, prompts[0], logits_processor=given)
        config = DecodeConfig(gamma=5, max_new_tokens=COUNT)
        found = generate(
            *(target, pair[1], prompts[0]), policy=STRICT, config=config, logits_processor=given
        )
    assert found.tokens[0].tolist() == wanted
    assert found.stats.generation_config == {"no_repeat_ngram_size": 3}


def test_a_kept_decoder(pair, prompts, configured):
    """One place for prompts of different lengths, one after the other."""
    with configured(begin_suppress_tokens=list(range(100)), min_new_tokens=2) as target:
        wanted = [_hf(target, prompt) for prompt in prompts]
        config = DecodeConfig(gamma=5, max_new_tokens=COUNT)
        decoder = Decoder(target, pair[1], STRICT, config)
        for prompt, tokens in zip([*prompts, prompts[0]], [*wanted, wanted[0]], strict=True):
            assert decoder.generate(prompt).tokens[0].tolist() == tokens


@pytest.mark.slow
def test_inside_hf_it_is_applied_once(pair, prompts, configured):
    with configured(repetition_penalty=1.3) as target, warnings.catch_warnings():
        wanted = _hf(target, prompts[0])
        lvspec = {"custom_generate": custom_generate, "draft_model": pair[1]}
        lvspec |= {"draft_inputs": prompts[0], "lvspec_policy": STRICT}
        assert _hf(target, prompts[0], **lvspec) == wanted
        config = DecodeConfig(generation_config=False)
        with pytest.raises(ValueError, match="^lvspec_config: expected generation_config at its"):
            _hf(target, prompts[0], **lvspec, lvspec_config=config)


def test_what_cannot_be_applied_is_refused(pair, prompts, plain, configured):
    with configured(guidance_scale=1.5) as target:
        with pytest.raises(ValueError, match="^generation_config: .*Guidance.*=False. leaves"):
            _ours(target, pair[1], prompts[0])
        found = _ours(target, pair[1], prompts[0], generation_config=False)
    assert found.tokens[0].tolist() == plain[0]


def test_models_and_their_generation_config_are_left_alone(pair, prompts, configured):
    with configured(repetition_penalty=1.3, eos_token_id=[7, 9]) as target:
        before = dict(vars(target.generation_config))
        _ours(target, pair[1], prompts[0])
        assert vars(target.generation_config) == before
