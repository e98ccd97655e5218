"""Wrong arguments: the message names the argument, what was expected and what came."""

import copy
from dataclasses import fields

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from lvspec import AcceptancePolicy, DecodeConfig, Decoder, generate, generate_many
from lvspec.models.families import FAMILIES, check_family
from lvspec.models.hf_names import CACHE_NAMES
from lvspec.phases.relevance import attention_peak, get_scorer

SHORT = {"gamma": 3, "max_new_tokens": 5, "eos_ids": ()}


@pytest.fixture
def inputs(make_prompt):
    return make_prompt(3, ("video", 4, 6, 6), 5)


@pytest.fixture
def refused(random_pair, inputs):
    """`refused(error, message, **arguments)` of generate."""

    def check(error, message, **changed):
        given = {"target": random_pair[0], "draft": random_pair[1], "inputs": inputs, **changed}
        target, draft, its_inputs = (given.pop(name) for name in ("target", "draft", "inputs"))
        with pytest.raises(error, match=message):
            generate(target, draft, its_inputs, **given)

    return check


@pytest.mark.parametrize("name, most", [("gamma", 63), ("max_new_tokens", None)])
def test_counts_of_the_config(name, most):
    for value in (0, -3, *([most + 1] if most else [])):
        wanted = "from 1 to 63" if most else ">= 1"
        with pytest.raises(
            ValueError, match=f"^{name}: expected an integer {wanted}, got {value}$"
        ):
            DecodeConfig(**{name: value})
    for value in (2.0, "3", True, None):
        with pytest.raises(TypeError, match=f"^{name}: expected an integer, got {value!r}$"):
            DecodeConfig(**{name: value})
    assert getattr(DecodeConfig(**{name: 1}), name) == 1


def test_cache_capacity_of_the_config():
    with pytest.raises(ValueError, match="^cache_capacity: expected an integer >= 1, got 0$"):
        DecodeConfig(cache_capacity=0)
    with pytest.raises(TypeError, match="^cache_capacity: expected an integer, got 'x'$"):
        DecodeConfig(cache_capacity="x")


@pytest.mark.parametrize("value", ["liger", "compile", None, True, "Kernels"])
def test_what_stands_in_for_small_operations(value):
    message = f"^fuse: expected one of kernels, none, got {value!r}"
    with pytest.raises(ValueError, match=message):
        DecodeConfig(fuse=value)


def test_policy_and_config(refused):
    refused(TypeError, "^policy: expected AcceptancePolicy, got 'strict'", policy="strict")
    refused(TypeError, "^config: expected DecodeConfig, got {'gamma': 5}", config={"gamma": 5})
    refused(TypeError, "^eos_ids: expected token ids, got 2", config=DecodeConfig(eos_ids=2))


def test_what_is_no_model(refused):
    refused(TypeError, "^target: expected a transformers model, got str", target="Qwen")
    wanted = '^draft: expected a transformers model, None, "self" or "ngram", got'
    refused(TypeError, f"{wanted} Linear", draft=torch.nn.Linear(1, 1))
    refused(ValueError, f"{wanted} 'Self'", draft="Self")


@pytest.mark.parametrize("value", ["0.5", True, None])
def test_a_share_that_is_no_number(value):
    with pytest.raises(TypeError, match=f"^draft_keep: expected a number, got {value!r}$"):
        DecodeConfig(draft_keep=value)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_share_out_of_range(value):
    with pytest.raises(ValueError, match="^draft_keep: expected a number from 0 to 1, got"):
        DecodeConfig(draft_keep=value)


@pytest.mark.parametrize("value", ["mass", None, 1])
def test_an_unknown_way_to_keep(value):
    message = f"^draft_keep_by: expected one of attention, uniform, got {value!r}$"
    with pytest.raises(ValueError, match=message):
        DecodeConfig(draft_keep_by=value)


def test_the_longest_match():
    with pytest.raises(ValueError, match="^ngram_max: expected an integer >= 1, got 0$"):
        DecodeConfig(ngram_max=0)


def test_unsupported_family(random_pair, refused, monkeypatch):
    assert check_family("qwen2_5_vl", "target") is FAMILIES["qwen2_5_vl"]
    with pytest.raises(
        ValueError, match=r"^draft: .* Qwen2.5-VL \(qwen2_5_vl\), .*, got .* 'llama'$"
    ):
        check_family("llama", "draft")
    other = copy.deepcopy(random_pair[1])
    other.config.model_type = "gpt2"
    refused(ValueError, "^target: expected a model of .*, got model_type 'gpt2'", target=other)
    refused(ValueError, "^draft: expected a model of .*, got model_type 'gpt2'", draft=other)


def test_sliding_window(random_pair, refused):
    other = copy.deepcopy(random_pair[1])
    other.model.language_model.config.layer_types = ["full_attention", "sliding_attention"]
    message = "expected full attention in every layer, got .*'sliding_attention'"
    refused(ValueError, f"^draft: {message}", draft=other)
    refused(ValueError, f"^target: {message}", target=other)


def test_pair_that_does_not_fit(random_pair, refused):
    other = copy.deepcopy(random_pair[1])
    other.config.video_token_id = 9
    refused(ValueError, r"^draft: expected .* token ids \(5, 6\), got \(5, 9\)", draft=other)
    elsewhere = copy.deepcopy(random_pair[1]).to("meta")
    refused(ValueError, "^draft: expected a model on cpu, got meta", draft=elsewhere)


@pytest.mark.parametrize("name", ["input_ids", "pixel_values_videos", "video_grid_thw"])
def test_inputs_on_another_device(refused, inputs, name):
    moved = {**inputs, name: inputs[name].to("meta")}
    refused(ValueError, f"^target inputs: expected {name} on .* cpu, got meta", inputs=moved)
    refused(ValueError, f"^draft inputs: expected {name} on .* cpu, got meta", draft_inputs=moved)


def test_inputs_that_are_no_mapping(refused, inputs):
    ids = inputs["input_ids"]
    refused(TypeError, "^target inputs: expected a mapping .* got Tensor", draft=None, inputs=ids)
    refused(TypeError, "^draft inputs: expected a mapping .* got int", draft_inputs=1)
    refused(TypeError, "^draft_inputs: expected one, .* got list", draft_inputs=[1])


@pytest.mark.parametrize(
    "ids, got",
    [
        (None, "NoneType"),
        ([[8, 9]], "list"),
        (torch.tensor([8, 9]), r"\(2,\)"),
        (torch.tensor([[8, 9]] * 2), r"\(2, 2\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"\(1, 0\)"),
    ],
)
def test_input_ids(refused, ids, got):
    message = rf"^target inputs: expected input_ids of shape \(1, T\) with T >= 1, got {got}$"
    refused(ValueError, message, draft=None, inputs={"input_ids": ids})


def test_attention_mask(refused):
    ids = torch.tensor([[8, 9, 10]])
    for mask, got in (
        (torch.ones(1, 4, dtype=torch.int64), r"\(1, 4\)"),
        (torch.ones(1, 1, 3, 3), r"\(1, 1, 3, 3\)"),
        ([[1, 1, 1]], "list"),
    ):
        refused(
            ValueError,
            rf"^target inputs: expected an attention_mask of shape \(1, 3\) .*, got {got}$",
            draft=None,
            inputs={"input_ids": ids, "attention_mask": mask},
        )
    refused(
        ValueError,
        "^target inputs: expected an attention_mask that keeps at least one token, got one of 0",
        draft=None,
        inputs={"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 0]])},
    )


def test_inputs_that_lvspec_makes_itself(refused, inputs):
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    refused(
        ValueError,
        "^target inputs: expected no position_ids, which lvspec makes itself, got one$",
        inputs={**inputs, "position_ids": positions},
    )


@pytest.mark.parametrize("name", [*CACHE_NAMES, "cache_params", "past_key_value", "mems", "state"])
def test_caches_by_every_name(refused, inputs, name):
    """Of any version: one that went on to the forward would be read instead of ours."""
    given = {**inputs, name: DynamicCache()}
    refused(ValueError, f"^target inputs: expected .*\\b{name}\\b", inputs=given)
    refused(ValueError, f"^draft inputs: expected .*\\b{name}\\b", draft_inputs=given)


def test_placeholders_and_pixels(refused, inputs, make_prompt):
    words = make_prompt(8)["input_ids"]
    without = {**inputs, "input_ids": words, "attention_mask": None, "mm_token_type_ids": None}
    refused(ValueError, r"^target inputs: expected a video placeholder .*\(5, 6\)", inputs=without)
    bare = {"input_ids": inputs["input_ids"]}
    wanted = "expected pixel_values or pixel_values_videos .* got neither"
    refused(ValueError, f"^draft inputs: {wanted}", draft_inputs=bare)
    refused(ValueError, f"^target inputs: {wanted}", inputs=bare, draft=None)


@pytest.mark.parametrize("with_draft, needed", [(True, 46 + 5 + 4), (False, 46 + 5 + 1)])
def test_capacity_of_the_cache(random_pair, refused, inputs, with_draft, needed):
    draft = random_pair[1] if with_draft else None
    config = DecodeConfig(**SHORT, cache_capacity=needed - 1)
    message = f"^cache_capacity: expected at least {needed} .* got {needed - 1}$"
    refused(ValueError, message, draft=draft, config=config)
    generations = [
        generate(random_pair[0], draft, inputs, config=DecodeConfig(**SHORT, cache_capacity=size))
        for size in (needed, needed + 37, None)
    ]
    assert all(generation.tokens.equal(generations[0].tokens) for generation in generations)


def test_scorer(refused):
    assert get_scorer("attention_peak") is attention_peak
    assert get_scorer(attention_peak) is attention_peak
    message = "^scorer: expected one of attention_peak, attention_mass, got 'peak'"
    for policy in (AcceptancePolicy.lvspec(), AcceptancePolicy.strict()):
        refused(ValueError, message, policy=policy, config=DecodeConfig(**SHORT, scorer="peak"))
    message = "^scorer: expected a name or a function, got 3"
    refused(TypeError, message, config=DecodeConfig(**SHORT, scorer=3))


def test_what_a_scorer_returns(refused):
    for returned, message in (
        (torch.ones(1, 3), r"^relevance: expected shape \(1, 4\), got \(1, 3\)"),
        (
            torch.ones(1, 4, dtype=torch.int64),
            "^relevance: expected dtype float32 .* got torch.int64",
        ),
    ):
        config = DecodeConfig(**SHORT, scorer=lambda output, returned=returned: returned)
        refused(ValueError, message, config=config)


PLACES = {
    "max_new_tokens": (5, r"config=lvspec.DecodeConfig\(max_new_tokens=5\)"),
    "gamma": ("auto", r"config=lvspec.DecodeConfig\(gamma='auto'\)"),
    "max_regret": (0.5, r"policy=lvspec.AcceptancePolicy.lvspec\(max_regret=0.5\)"),
    "top_k": (3, r"config=lvspec.DecodeConfig\(top_k=3\) .* policy=.*\(top_k=3\)"),
    "generation_config": (None, r"config=lvspec.DecodeConfig\(generation_config=...\)"),
    "do_sample": (True, r"config=lvspec.DecodeConfig\(temperature=...\)"),
    "eos_token_id": (7, r"config=lvspec.DecodeConfig\(eos_ids="),
    "assistant_model": (None, "the draft as second argument"),
    "repetition_penalty": (1.1, "it in target.generation_config, or as one of logits_processor"),
    "max_new_token": (5, r"config=lvspec.DecodeConfig\(max_new_tokens=5\)"),
    "polcy": (None, "policy"),
    "nonsense": (None, "one of .*policy, config"),
}


@pytest.mark.parametrize("name", PLACES)
def test_keywords_that_belong_elsewhere(random_pair, make_prompt, name):
    """Every name of DecodeConfig, a policy or HF is answered by the place where it goes."""
    value, place = PLACES[name]
    calls = {
        "generate": lambda: generate(*random_pair, make_prompt(4), **{name: value}),
        "generate_many": lambda: generate_many(*random_pair, [make_prompt(4)], **{name: value}),
        "Decoder": lambda: Decoder(*random_pair, **{name: value}),
    }
    for function, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name}: expected {place}.*keyword of {function}$"):
            call()


def test_no_name_is_left_to_python(random_pair, make_prompt):
    names = {field.name for kind in (DecodeConfig, AcceptancePolicy) for field in fields(kind)}
    names |= set(vars(GenerationConfig())) - {"stop_strings"}  # which is an argument here too
    for name in names:
        with pytest.raises(TypeError, match=f"^{name}: expected "):
            generate(*random_pair, make_prompt(4), **{name: None})
