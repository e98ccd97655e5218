"""fp8 caches: the same tokens whoever drafts, and those of HF's forward over such keys and values.

In float64, where no rounding but that of the cache changes a token.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

from lvspec import AcceptancePolicy, DecodeConfig, generate, generate_many, ops, quantize
from lvspec.models.cache import HEADROOM
from lvspec.models.hf_names import CACHE
from lvspec.models.inputs import check_inputs
from lvspec.models.model import Model
from lvspec.reference.float8 import FLOAT8, float8_scale, narrow_to_float8

STRICT = AcceptancePolicy.strict()
TOKENS = 24


def config(**options):
    given = {"gamma": 4, "max_new_tokens": TOKENS, "eos_ids": (), "cache_dtype": "fp8"}
    return DecodeConfig(**{**given, **options})


class RoundedCache(DynamicCache):
    """HF's own; what later tokens see of keys and values went through float8."""

    def __init__(self):
        super().__init__()
        self.factors = {}

    def update(self, keys, values, layer_idx, *args, **kwargs):
        is_prompt = layer_idx not in self.factors
        if is_prompt:
            self.factors[layer_idx] = [
                float8_scale(x, (0, 2, 3), HEADROOM)[:, None, None] for x in (keys, values)
            ]
        rounded = [
            narrow_to_float8(x, scale).to(x.dtype) * scale
            for x, scale in zip((keys, values), self.factors[layer_idx], strict=True)
        ]
        seen = super().update(*rounded, layer_idx, *args, **kwargs)
        return (keys, values) if is_prompt else seen


@torch.no_grad()
def by_hf(model, prompt, count=TOKENS):
    """Greedy tokens of HF's forward, one by one."""
    text, cache = model.model.language_model, RoundedCache()
    inputs = check_inputs(Model(model, "target"), prompt)
    positions = model.model.get_rope_index(
        **{
            name: inputs[name]
            for name in ("input_ids", "mm_token_type_ids", "video_grid_thw", "image_grid_thw")
            if name in inputs
        }
    )[0]
    names = ("input_ids", "pixel_values_videos", "video_grid_thw", "mm_token_type_ids")
    given = {name: inputs[name] for name in names if name in inputs}
    logits = model(**given, position_ids=positions, **{CACHE: cache}, use_cache=True).logits
    found = [int(logits[0, -1].argmax())]
    for step in range(1, count):
        hidden = text(
            input_ids=torch.tensor([found[-1:]]),
            position_ids=positions[..., -1:] + step,
            **{CACHE: cache},
            use_cache=True,
        ).last_hidden_state
        found.append(int(model.lm_head(hidden)[0, -1].argmax()))
    return found


@pytest.fixture(scope="module")
def prompt(make_prompt):
    return make_prompt(3, ("video", 2, 6, 4), 5, seed=3, dtype=torch.float64)


@pytest.fixture(scope="module")
def wanted(pair, prompt):
    return by_hf(pair[0], prompt)


def test_the_target_alone(pair, prompt, wanted, hf_greedy):
    """And that is not what it says with a cache of its own type."""
    found = generate(pair[0], None, prompt, config=config())
    assert found.tokens[0].tolist() == wanted
    assert wanted != hf_greedy(pair[0], prompt, TOKENS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fuse": "none"},
        {"tree": "specvlm"},
        {"tree": "specvlm", "fuse": "none"},
        {"draft_keep": 0.3},
        {"draft_ngram": 3},
    ],
    ids=str,
)
def test_strict_gives_its_tokens(pair, prompt, wanted, options):
    """By lvspec's pass and by HF's, along chains and trees, with a draft that keeps less."""
    found = generate(*pair, prompt, policy=STRICT, config=config(**options))
    assert found.tokens[0].tolist() == wanted
    assert sum(found.stats.num_accepted) > 0


@pytest.mark.parametrize("draft", ["self", "ngram"])
def test_without_a_model_that_drafts(pair, prompt, wanted, draft):
    keep = {"draft_keep": 0.5} if draft == "self" else {}
    found = generate(pair[0], draft, prompt, policy=STRICT, config=config(**keep))
    assert found.tokens[0].tolist() == wanted


def test_a_sequence_by_itself(pair, make_prompt, prompt, wanted):
    """In a batch of others, and in a place that another had before, with other factors."""
    others = [
        make_prompt(4, ("video", 2, 4, 4), 3, seed=seed, dtype=torch.float64) for seed in (5, 6)
    ]
    prompts = [*others, prompt]
    given = {"policy": STRICT, "config": config(), "batch_size": 2}
    found = [result.tokens[0].tolist() for result in generate_many(*pair, prompts, **given)]
    assert found[2] == wanted
    for other, ours in zip(others, found[:2], strict=True):
        assert ours == generate(pair[0], None, other, config=config()).tokens[0].tolist()


def test_with_fp8_weights(pair, prompt):
    target = quantize(copy.deepcopy(pair[0]), "fp8")
    found = generate(target, pair[1], prompt, policy=STRICT, config=config())
    assert found.tokens[0].tolist() == by_hf(target, prompt)


@pytest.mark.skipif(ops.active_backend("cpu") != "cpp", reason="needs the C++ extension")
def test_no_operation_of_cpp_over_it(pair, make_prompt):
    """Its passes have caches of their own type; that others go through many operations is said."""
    target, draft = (copy.deepcopy(model).float() for model in pair)
    prompt = make_prompt(3, ("video", 2, 6, 4), 5, seed=3)
    usual = generate(target, draft, prompt, policy=STRICT, config=config(cache_dtype="auto"))
    with pytest.warns(RuntimeWarning, match="many operations, slower: .*cache_dtype=.fp8.") as said:
        found = generate(target, draft, prompt, policy=STRICT, config=config())
    assert [role for role in ("target", "draft") if role in str(said[0].message)] == ["target"]
    assert len(said) == 2
    assert set(usual.stats.passes.values()) == {"own: one operation"}
    assert found.stats.passes == {"target": "own", "draft": "own"}
    assert found.tokens[0].tolist() == by_hf(target, prompt)


def test_a_byte_a_number(random_pair):
    caches = [
        Model(random_pair[0], "target", cache_dtype=dtype).new_cache(
            batch_size=2, capacity=30, num_slots=3
        )
        for dtype in ("auto", "fp8")
    ]
    assert caches[1].k.dtype == FLOAT8 and caches[0].k.nbytes == 4 * caches[1].k.nbytes
    caches[1].grow(40)
    assert caches[1].k.shape[3] == 40 and caches[1].k.dtype == FLOAT8


def test_chips_without_float8(pair, monkeypatch):
    monkeypatch.setattr("lvspec.models.model.converts_from_float8", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older one")
    with pytest.raises(ValueError, match="^cache_dtype: expected a GPU of compute .* an older one"):
        generate(pair[0], None, {"input_ids": torch.tensor([[8, 9]])}, config=config())


def test_what_is_no_cache_dtype():
    with pytest.raises(ValueError, match="^cache_dtype: expected one of auto, fp8, got 'int8'"):
        config(cache_dtype="int8")
