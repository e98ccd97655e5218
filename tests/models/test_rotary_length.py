"""Rotary embeddings that follow the length of a sequence: HF's tokens, or a refusal by name."""

import copy

import pytest

from lvspec import AcceptancePolicy, DecodeConfig, Decoder, generate, generate_many

LIMIT = 40


@pytest.fixture(params=["dynamic", "longrope"])
def target(request, pair):
    """In float64, with frequencies that change where a sequence is longer than LIMIT."""
    config = copy.deepcopy(pair[0].config)
    text = config.text_config
    half = text.hidden_size // text.num_attention_heads // 2
    text.rope_parameters |= {"rope_type": request.param, "factor": 4.0}
    text.max_position_embeddings = LIMIT
    if request.param == "longrope":
        text.max_position_embeddings = 4 * LIMIT
        text.rope_parameters |= {
            "original_max_position_embeddings": LIMIT,
            "short_factor": [1.0] * half,
            "long_factor": [4.0] * half,
        }
    made = type(pair[0])(config).double()
    made.load_state_dict(pair[0].state_dict())
    made.generation_config.eos_token_id = None
    return made.eval()


def config(new_tokens, **options):
    return DecodeConfig(gamma=4, max_new_tokens=new_tokens, eos_ids=(), **options)


STRICT = AcceptancePolicy.strict()


def test_up_to_the_limit(target, pair, make_prompt, hf_greedy):
    prompt = make_prompt(LIMIT - 5 - 12)
    for draft in (None, "self", pair[1]):
        found = generate(target, draft, prompt, policy=STRICT, config=config(12))
        assert found.tokens[0].tolist() == hf_greedy(target, prompt, 12)


def test_past_the_limit(target, pair, make_prompt, hf_greedy):
    """As target and as draft; the limit is one: HF's tokens are others from there on."""
    prompt = make_prompt(LIMIT - 5 - 12 + 1)
    for models in ((target, "self"), (target, pair[1]), (pair[0], target)):
        with pytest.raises(
            ValueError, match=f"expected at most {LIMIT} positions .* got {LIMIT + 1}"
        ):
            generate(*models, prompt, policy=STRICT, config=config(12))
    role = "draft: .*" + target.model.language_model.config.rope_parameters["rope_type"]
    with pytest.raises(ValueError, match=role):
        generate(pair[0], target, prompt, policy=STRICT, config=config(12))
    assert hf_greedy(target, prompt, 40) != hf_greedy(pair[0], prompt, 40)


def test_neighbours_do_not_count(target, make_prompt, hf_greedy):
    """A long prompt is refused by itself, HF's long sequences before leave nothing behind."""
    short, long = make_prompt(9), make_prompt(LIMIT)
    wanted = hf_greedy(target, short, 12)
    hf_greedy(target, long, 12)
    found = list(
        generate_many(
            target,
            "self",
            [short, long, make_prompt(LIMIT - 17), short],
            batch_size=2,
            policy=STRICT,
            config=config(12),
            return_exceptions=True,
        )
    )
    assert [found[index].tokens[0].tolist() for index in (0, 3)] == [wanted] * 2
    assert isinstance(found[1], ValueError) and f"at most {LIMIT} positions" in str(found[1])


def test_positions_that_run_ahead_of_the_tokens(target, make_prompt):
    """A video of few frames and many seconds."""
    prompt = make_prompt(3, ("video", 3, 4, 4), 2, seconds=12.0)
    assert prompt["input_ids"].shape[1] < LIMIT - 17
    made = Decoder(target, None, STRICT, config(8))
    with pytest.raises(ValueError, match=f"expected at most {LIMIT} positions"):
        made.generate(
            {name: x.double() if name == "pixel_values_videos" else x for name, x in prompt.items()}
        )
