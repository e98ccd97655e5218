"""The loop on a real CUDA device: CUDA graphs, late reports, and nothing that the device waits for.

Weights and prompts are those of other tests, moved there; all that is compared is float32.
"""

import copy

import pytest
import torch
from ways import WAYS

from lvspec import AcceptancePolicy, DecodeConfig, Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def models(random_pair, noisy_draft):
    """(target, draft) on the device, in float32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return copy.deepcopy(random_pair[0]).cuda(), copy.deepcopy(noisy_draft).cuda()


@pytest.fixture(scope="module")
def prompts(make_prompt):
    prompts = [make_prompt(3, ("video", 4, 6, 6), 5 + 3 * i, seed=i) for i in range(3)]
    return [{name: value.cuda() for name, value in prompt.items()} for prompt in prompts]


@pytest.fixture
def decoder(models):
    def make(way, *, policy=None, batch_size=2, **options):
        draft, own = WAYS[way]
        config = {"gamma": 5, "max_new_tokens": 40, "eos_ids": (3,), "cache_capacity": 140}
        return Decoder(
            models[0],
            models[1] if draft == "model" else draft,
            policy or AcceptancePolicy.lvspec(regret_budget=3.0),
            DecodeConfig(**{**config, **own, **options}),
            batch_size=batch_size,
        )

    return make


def _facts(generations):
    return [
        (x.index, x.tokens.tolist(), x.kinds.tolist(), x.stats.num_accepted, x.stats.num_drafted)
        for x in generations
    ]


@pytest.mark.parametrize("way", WAYS)
def test_a_graph_does_what_python_does(decoder, prompts, way):
    expected = decoder(way, capture=False, lag=0).generate(prompts)
    found = decoder(way).generate(prompts)
    assert _facts(found) == _facts(expected)
    assert found[-1].stats.loop == "graph"
    assert expected[0].stats.loop == "eager: DecodeConfig(capture=False)"
    assert found[-1].stats.seconds["iteration"] > 0


def test_the_length_of_chains_is_measured(decoder, prompts):
    """By graphs of passes, and an iteration is captured behind that like any other."""
    found = decoder("chain", gamma="auto").generate(prompts[0]).stats
    assert found.gamma_choice["by"] == "measured" and found.loop == "graph"
    assert 0 < found.gamma_choice["cost_ratio"] < 10 and 0 < found.gamma_choice["row_ratio"] < 1


def test_n_grams_have_two_graphs(decoder, prompts, hf_greedy, models):
    made = decoder("n-grams", policy=AcceptancePolicy.strict(), eos_ids=(), batch_size=1)
    assert made.engine._finds_late
    for prompt in prompts:
        assert made.generate(prompt).tokens[0].tolist() == hf_greedy(models[0], prompt, 40)
    assert len(made.engine.runner._captured) == 2


@pytest.mark.parametrize("way", [w for w in WAYS if "sampling" not in w and "float8" not in w])
def test_strict_is_hf_greedy(decoder, models, hf_greedy, prompts, way):
    made = decoder(way, policy=AcceptancePolicy.strict(), eos_ids=(), batch_size=1)
    for prompt in prompts:
        found = made.generate(prompt)
        assert found.tokens[0].tolist() == hf_greedy(models[0], prompt, 40)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_the_loop_synchronises_nothing(decoder, prompts, way, capture):
    """torch reports every synchronisation that it knows of; events are waited for without it."""
    made = decoder(way, capture=capture, max_new_tokens=60, eos_ids=(), cache_capacity=180)
    engine = made.engine
    with torch.inference_mode():
        for prompt in prompts[:2]:
            engine.admit(made.request(prompt))
        with engine.attention():
            for _ in range(4):  # what is compiled or captured is, then
                engine.iterate()
            before = [sequence.count for sequence in engine.active]
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(3):
                    engine.iterate()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert len(before) == len(engine.active) == 2
    assert all(x.count > count for x, count in zip(engine.active, before, strict=True))


def test_a_synchronisation_is_seen():
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_lag_changes_nothing(decoder, prompts, lag):
    expected = decoder("chain", capture=False, lag=0).generate(prompts)
    assert _facts(decoder("chain", lag=lag).generate(prompts)) == _facts(expected)


def test_a_replay_allocates_nothing(decoder, prompts):
    made = decoder("chain", max_new_tokens=60, eos_ids=(), cache_capacity=180)
    engine = made.engine
    with torch.inference_mode():
        engine.admit(made.request(prompts[0]))
        with engine.attention():
            for _ in range(4):
                engine.iterate()
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            for _ in range(3):
                engine.iterate()
    assert engine.runner.description == "graph"
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_the_embedded_pair_says_what_it_says_on_a_cpu(tmp_path):
    from lvspec.shapes.evaluation import MAX_NEW_TOKENS, make_clips
    from lvspec.shapes.pair import load_embedded_pair

    here, there = load_embedded_pair(), load_embedded_pair(device=torch.device("cuda"))
    config = DecodeConfig(max_new_tokens=MAX_NEW_TOKENS)
    decoders = [Decoder(pair.target, pair.draft, config=config) for pair in (here, there)]
    for clip in make_clips(here, "evaluation", 4, tmp_path):
        moved = {name: value.cuda() for name, value in clip.inputs.items()}
        ours, theirs = decoders[0].generate(clip.inputs), decoders[1].generate(moved)
        assert theirs.tokens.tolist() == ours.tokens.tolist()
    assert decoders[1].engine.runner.description == "graph"
