"""custom_generate: HF's `generate` with lvspec inside says what `lvspec.generate` says.

In float64, where rows of different passes do not differ by enough to change a token.
"""

import copy

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation import logits_process
from transformers.generation.streamers import BaseStreamer

import lvspec
from lvspec import AcceptancePolicy, DecodeConfig, generate
from lvspec.models.hf_names import CACHE, caches_in

STRICT = AcceptancePolicy.strict()
COUNT = 20


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ends += 1


@pytest.fixture(scope="module")
def prompts(make_prompt):
    parts = {
        "video": (3, ("video", 4, 6, 6), 5),
        "text": (9,),
        "image and video": (2, ("image", 4, 8), 4, ("video", 2, 6, 4), 3),
        "two videos": (2, ("video", 3, 4, 6), 4, ("video", 2, 6, 4), 3),
        "long video": (1, ("video", 6, 4, 14), 2),
    }
    return {
        name: make_prompt(*each, seed=len(name), dtype=torch.float64)
        for name, each in parts.items()
    }


@pytest.fixture(scope="module")
def inputs(prompts):
    return prompts["video"]


def _hf(pair, inputs, **arguments):
    """HF's own generate."""
    arguments = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0, **arguments}
    return pair[0].generate(**inputs, **arguments)


def _inside(pair, inputs, draft=True, policy=STRICT, **arguments):
    """HF's generate with lvspec inside."""
    if draft:
        arguments = {"draft_model": pair[1], "draft_inputs": inputs, **arguments}
    return _hf(
        pair,
        inputs,
        custom_generate=lvspec.custom_generate,
        lvspec_policy=policy,
        **{"lvspec_config": DecodeConfig(gamma=5), **arguments},
    )


@pytest.mark.parametrize("name", ["video", "text", "image and video", "two videos", "long video"])
@pytest.mark.parametrize("draft", [True, False])
def test_strict_is_hf_greedy(pair, prompts, name, draft):
    wanted = _hf(pair, prompts[name])
    found = _inside(pair, prompts[name], draft)
    assert found.equal(wanted)
    assert found.shape[1] == prompts[name]["input_ids"].shape[1] + COUNT


@pytest.mark.parametrize("policy", [None, AcceptancePolicy.relaxed()])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 12, "top_p": 0.9}])
def test_the_same_as_generate(pair, inputs, policy, sampling):
    """Loose rules and samples; without a seed, both draw theirs from torch's generator."""
    torch.manual_seed(11)
    found = _inside(pair, inputs, policy=policy, do_sample=bool(sampling), **sampling)
    torch.manual_seed(11)
    config = DecodeConfig(gamma=5, max_new_tokens=COUNT, eos_ids=(), **sampling)
    assert found.equal(generate(*pair, inputs, policy=policy, config=config).sequences)


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 3},
        {"max_new_tokens": None, "max_length": 80},
        {"suppress_tokens": list(range(60, 200))},
        {"bad_words_ids": [[176], [92, 67]]},
        {"sequence_bias": {(176,): -8.0, (19, 92): -8.0}},
        {"eos_token_id": [67, 118]},
        {"eos_token_id": -1},
        {"eos_token_id": [67, -1], "min_new_tokens": 9},
        {"eos_token_id": [67, 118], "min_new_tokens": 9},
        {"eos_token_id": [67, 118], "forced_eos_token_id": 67, "max_new_tokens": 4},
        {"begin_suppress_tokens": [19]},
        {"prefix_allowed_tokens_fn": lambda batch_id, ids: list(range(10, 30 + len(ids)))},
        {"renormalize_logits": True, "remove_invalid_values": True},
        {"max_time": 1e6},
        {"temperature": 0.2, "top_k": 3},  # of no consequence for greedy decoding
    ],
    ids=lambda fields: " ".join(fields),
)
@pytest.mark.parametrize("draft", [True, False])
def test_fields_of_the_generation_config(pair, inputs, fields, draft):
    wanted = _hf(pair, inputs, **fields)
    assert _inside(pair, inputs, draft, **fields).equal(wanted)


def test_a_generation_config_object(pair, inputs):
    config = GenerationConfig(
        max_new_tokens=15, do_sample=False, repetition_penalty=1.2, eos_token_id=[67, 118]
    )
    wanted = pair[0].generate(**inputs, generation_config=config, pad_token_id=0)
    found = pair[0].generate(
        **inputs,
        generation_config=config,
        pad_token_id=0,
        custom_generate=lvspec.custom_generate,
        lvspec_policy=STRICT,
        draft_model=pair[1],
        draft_inputs=inputs,
    )
    assert found.equal(wanted)


def test_the_models_own_generation_config(pair, inputs):
    target = copy.deepcopy(pair[0])
    target.generation_config.eos_token_id = 67
    target.generation_config.repetition_penalty = 1.2
    target.generation_config.max_new_tokens = 18
    wanted = _hf((target,), inputs, max_new_tokens=None)
    assert _inside((target, pair[1]), inputs, max_new_tokens=None).equal(wanted)
    unlike = generate(
        target, pair[1], inputs, policy=STRICT, config=DecodeConfig(max_new_tokens=18)
    )
    assert not unlike.sequences.equal(wanted), "lvspec.generate takes its processors by argument"


def test_criteria_and_processors_of_the_user(pair, inputs):
    length = inputs["input_ids"].shape[1]
    arguments = {
        "logits_processor": LogitsProcessorList(
            [logits_process.NoRepeatNGramLogitsProcessor(1), lambda ids, scores: scores.flip(1)]
        ),
        "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(length + 6)]),
    }
    wanted = _hf(pair, inputs, **arguments)
    assert wanted.shape[1] == length + 6
    assert _inside(pair, inputs, **arguments).equal(wanted)


def test_samples(pair, inputs):
    """HF's sampling fields apply to the target's rows once, in HF's order."""
    fields = {"do_sample": True, "temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.05}
    torch.manual_seed(0)
    first, second = _inside(pair, inputs, **fields), _inside(pair, inputs, **fields)
    assert not first.equal(second)
    torch.manual_seed(0)
    assert _inside(pair, inputs, **fields).equal(first)
    seeded = {**fields, "lvspec_config": DecodeConfig(gamma=5, seed=3)}
    assert _inside(pair, inputs, **seeded).equal(_inside(pair, inputs, **seeded))
    config = DecodeConfig(gamma=5, temperature=1.0)
    with pytest.raises(ValueError, match="lvspec_config: expected temperature at its default"):
        _inside(pair, inputs, **fields, lvspec_config=config)
    length = inputs["input_ids"].shape[1]
    for found in (first, second):
        with torch.no_grad():
            rows = pair[0](
                **{name: x for name, x in inputs.items() if "mask" not in name and "mm" not in name}
                | {"input_ids": found, "mm_token_type_ids": 2 * (found == 6).long()}
            ).logits[0, length - 1 : -1]
        warpers = LogitsProcessorList(
            [
                logits_process.TemperatureLogitsWarper(1.3),
                logits_process.TopKLogitsWarper(8),
                logits_process.TopPLogitsWarper(0.9),
                logits_process.MinPLogitsWarper(0.05),
            ]
        )
        allowed = warpers(found, rows).isfinite()
        assert allowed.gather(1, found[0, length:, None]).all()


@pytest.mark.parametrize("top_p", [0.0, 1.0])
def test_the_ends_of_top_p(pair, inputs, top_p):
    """At 0 HF samples the best token and no other."""
    fields = {"do_sample": True, "top_p": top_p, "top_k": 0}
    torch.manual_seed(0)
    first, second = _inside(pair, inputs, **fields), _inside(pair, inputs, **fields)
    if top_p:
        assert not first.equal(second)
    else:
        assert first.equal(second) and first.equal(_hf(pair, inputs, **fields))


@pytest.mark.parametrize("draft", [True, False])
def test_a_prompt_of_one_token(pair, draft):
    inputs = {"input_ids": torch.tensor([[19]]), "attention_mask": torch.ones(1, 1).long()}
    assert _inside(pair, inputs, draft).equal(_hf(pair, inputs))


@pytest.mark.parametrize("draft", [True, False])
def test_weights_that_are_elsewhere_until_they_are_needed(pair, inputs, draft):
    """As of accelerate: HF runs such a model, with the pixels where it computes."""
    accelerate = pytest.importorskip("accelerate")
    target = copy.deepcopy(pair[0])
    wanted = _hf((target,), inputs)
    accelerate.cpu_offload(target, execution_device="cpu")
    assert target.lm_head.weight.is_meta
    assert _hf((target,), inputs).equal(wanted)
    for capture in (True, False):
        config = DecodeConfig(gamma=5, capture=capture)
        assert _inside((target, pair[1]), inputs, draft, lvspec_config=config).equal(wanted)


def test_caches_that_hf_hands_on(pair, prompts):
    """Its own, which is empty, by whatever name; one that holds something is refused."""
    assert set(caches_in({CACHE: DynamicCache(), "later": DynamicCache(), "x": 1})) == {
        CACHE,
        "later",
    }
    text = prompts["text"]
    assert _inside(pair, text, **{CACHE: DynamicCache()}).equal(_hf(pair, text))
    cache = DynamicCache()
    with torch.no_grad():
        pair[0](input_ids=text["input_ids"][:, :4], **{CACHE: cache})
    with pytest.raises(ValueError, match=f"^{CACHE}: expected none, .* got a cache of 4 pos"):
        _inside(pair, text, **{CACHE: cache})


def test_streamer(pair, inputs):
    recorder = Recorder()
    found = _inside(pair, inputs, lvspec_streamer=recorder)
    assert sum(recorder.puts, []) == found[0].tolist()
    assert recorder.ends == 1


def test_stop_strings(pair, inputs, random_pair_folders):
    tokenizer = AutoTokenizer.from_pretrained(random_pair_folders[0])
    whole, length = _inside(pair, inputs), inputs["input_ids"].shape[1]
    words = whole[0, length + 2 : length + 4].tolist()
    assert max(words) < len(tokenizer)
    text = tokenizer.decode(words)
    stop = next(
        n for n in range(length + 2, length + COUNT) if whole[0, n - 2 : n].tolist() == words
    )
    found = _inside(pair, inputs, stop_strings=[text], lvspec_tokenizer=tokenizer)
    assert found.equal(whole[:, :stop])
    with pytest.raises(ValueError, match="^lvspec_tokenizer: expected one"):
        _inside(pair, inputs, stop_strings=[text], tokenizer=tokenizer)


def test_what_is_returned(pair, inputs):
    plain = _inside(pair, inputs)
    assert plain.dtype == torch.int64 and plain.device == inputs["input_ids"].device
    assert _inside(pair, inputs, return_dict_in_generate=True).sequences.equal(plain)
    with pytest.raises(ValueError, match="^output_scores: expected False"):
        _inside(pair, inputs, return_dict_in_generate=True, output_scores=True)
    before = _hf(pair, inputs)
    assert _hf(pair, inputs).equal(before), "nothing is left behind in the model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"assistant_model": True},
            r"^assistant_model: .* give draft_model=\.\.\. and draft_inputs",
        ),
        ({"streamer": True}, r"^streamer: .* give lvspec_streamer="),
        ({"num_beams": 2}, "^generation_config: expected greedy decoding or sampling .* got beam"),
        (
            {"do_sample": True, "num_return_sequences": 2},
            "^num_return_sequences: expected 1, got 2",
        ),
        ({"prompt_lookup_num_tokens": 3}, "^generation_config: .* got assisted_generation"),
        ({"use_cache": False}, "^use_cache: expected True"),
        ({"cache_implementation": "static"}, "^cache_implementation: expected None"),
        ({"guidance_scale": 1.5}, "^logits_processor: expected .* got UnbatchedClassifierFree"),
        ({"draft_inputs": None}, "^draft_inputs: expected the prompt as the draft's processor"),
        ({"draft_model": None}, "^draft_model: expected a model, for there are draft_inputs"),
        (
            {"lvspec_config": DecodeConfig(max_new_tokens=7)},
            "^lvspec_config: expected max_new_tokens at its default",
        ),
        ({"lvspec_config": 3}, "^lvspec_config: expected DecodeConfig, got 3"),
        ({"lvspec_polcy": 3}, "not used by the model: .*lvspec_polcy"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, dict) else "",
)
def test_what_would_be_dropped_or_cannot_be_done(pair, inputs, arguments, message):
    stand_ins = {"assistant_model": pair[1], "streamer": Recorder()}
    given = {name: stand_ins.get(name, value) for name, value in arguments.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        _inside(pair, inputs, **given)


def test_prompts_that_cannot_be_taken(pair, prompts):
    text = prompts["text"]
    two = {name: torch.cat([value, value]) for name, value in text.items()}
    with pytest.raises(ValueError, match=r"^input_ids: expected one prompt, .* got \(2, 9\)"):
        _inside(pair, two, draft=False)
    padded = {**text, "attention_mask": text["attention_mask"].clone()}
    padded["attention_mask"][0, :2] = 0
    with pytest.raises(ValueError, match="^attention_mask: expected a prompt without padding"):
        _inside(pair, padded, draft=False)
    embedded = pair[0].get_input_embeddings()(text["input_ids"])
    with pytest.raises(ValueError, match="^inputs_embeds: expected input_ids instead"):
        _inside(pair, {**text, "inputs_embeds": embedded}, draft=False)
